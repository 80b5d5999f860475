"""The tensors of an RWKV-6 ("Finch", x060): names, order, kinds and sizes.

The canonical names are those of BlinkDL's .pth files, in their order. C: width, H: heads, N: size of
a head, D: rank of the mixing, E: rank of the decay, F: width of the feed-forward, V: vocabulary.
Source: github.com/BlinkDL/RWKV-LM, RWKV-v5/src/model.py, RWKV_Tmix_x060 and RWKV_CMix_x060.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import CheckpointError

BLOCK = "blocks.{layer}"
MIX_ORDER = ("w", "k", "v", "r", "g")
"""The five inputs of the time mixing, in the order of time_maa_w1 and time_maa_w2."""

_NORMS = tuple(f"{BLOCK}.{norm}.{part}" for norm in ("ln1", "ln2") for part in ("weight", "bias"))
FIRST_NORM = (f"{BLOCK}.ln0.weight", f"{BLOCK}.ln0.bias")
"""The norm after the embedding; stored in the first block only."""
_TIME = tuple(
    f"{BLOCK}.att.time_{part}"
    for part in (
        *("maa_" + letter for letter in ("x", *MIX_ORDER)),
        *("maa_w1", "maa_w2", "decay", "decay_w1", "decay_w2", "faaaa"),
    )
)
STATE = f"{BLOCK}.att.time_state"
"""(H, v, k): the initial state of a sequence, after state tuning; most models have none."""
_ATT = tuple(f"{BLOCK}.att.{part}.weight" for part in ("receptance", "key", "value", "output", "gate"))
_ATT_NORM = (f"{BLOCK}.att.ln_x.weight", f"{BLOCK}.att.ln_x.bias")
_FFN_TIME = (f"{BLOCK}.ffn.time_maa_k", f"{BLOCK}.ffn.time_maa_r")
_FFN = tuple(f"{BLOCK}.ffn.{part}.weight" for part in ("key", "receptance", "value"))

NAMES = (
    "emb.weight",
    *_NORMS,
    *FIRST_NORM,
    *_TIME,
    STATE,
    *_ATT,
    *_ATT_NORM,
    *_FFN_TIME,
    *_FFN,
    "ln_out.weight",
    "ln_out.bias",
    "head.weight",
)
"""All names, in the order of a .pth file, with {layer} in place of the layer's number."""

VECTORS = tuple(name for name in (*_TIME, *_FFN_TIME) if not name.endswith(("_w1", "_w2", "faaaa")))
"""The tensors of shape (1, 1, C), which some files store as (H, N) or (C,)."""

ROLES = ("att.receptance", "att.key", "att.value", "att.gate", "att.output") + (
    "ffn.key",
    "ffn.receptance",
    "ffn.value",
)
"""The plain matrices of a layer, by their path in a block. time_maa_w* and time_decay_w* are none, because
there is a tanh between the two factors."""


GROUPS = {"time": r".*\.time_(?!state).*", "norms": r"(.*\.)?ln\w*\.(weight|bias)"}
"""What can be trained fully in addition to the adapters, as RWKV-PEFT does by default."""


def network_path(role: str, layer: int) -> str:
    """The path of a matrix in the network of `rwkv6`."""
    return f"{BLOCK.replace('{layer}', str(layer))}.{role}"


def states(infos: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The initial states of a model's layers, whether it has them or not."""
    return Sizes.of(infos).states()


def rename(canonical: str, name: str) -> RenameRule:
    """The rule for a layout's tensor `name` with the same values in the same order as `canonical`."""
    # Files store vectors in several shapes; the canonical one is (1, 1, C).
    to_canonical = (lambda tensor: [tensor.reshape(1, 1, -1)]) if canonical in VECTORS else None
    return RenameRule(
        (canonical,),
        name,
        None,
        to_canonical,
        first_only=canonical in FIRST_NORM,
        optional=canonical == STATE,
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model, read from its tensors, because released configurations are known to be wrong."""

    layers: int
    vocabulary: int
    width: int
    heads: int
    head_size: int
    mix_rank: int
    decay_rank: int
    feed_forward: int

    @staticmethod
    def of(infos: Mapping[str, TensorInfo]) -> "Sizes":
        """Of a checkpoint under canonical names. Raises CheckpointError if its tensors disagree."""

        def size(name: str, axis: int) -> int:
            shape = infos[name].shape
            return shape[axis] if axis < len(shape) else 0

        sizes = Sizes(
            layers=sum(name.endswith(".att.key.weight") for name in infos),
            vocabulary=size("emb.weight", 0),
            width=size("emb.weight", 1),
            heads=size("blocks.0.att.time_faaaa", 0),
            head_size=size("blocks.0.att.time_faaaa", 1),
            mix_rank=size("blocks.0.att.time_maa_w2", 1),
            decay_rank=size("blocks.0.att.time_decay_w1", 1),
            feed_forward=size("blocks.0.ffn.key.weight", 0),
        )
        expected = sizes.shapes()
        for name, info in infos.items():
            if info.shape != expected[name]:
                raise CheckpointError(
                    f"{name} has the shape {info.shape} but the other tensors imply {expected[name]}; "
                    "restore the checkpoint"
                )
        return sizes

    def states(self) -> list[TensorInfo]:
        """The initial state of every layer."""
        shape = (self.heads, self.head_size, self.head_size)
        names = [STATE.replace("{layer}", str(layer)) for layer in range(self.layers)]
        return [TensorInfo(name, shape, "F32") for name in names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, the optional ones included."""
        width = self.width
        heads = self.heads
        size = self.head_size
        inner = heads * size
        vector = (1, 1, width)
        kinds: dict[str, tuple[int, ...]] = {name: vector for name in VECTORS}
        kinds |= {name: (width,) for name in (*_NORMS, *FIRST_NORM, "ln_out.weight", "ln_out.bias")}
        kinds |= {name: (inner,) for name in _ATT_NORM}
        kinds |= {name: (inner, width) for name in _ATT}
        kinds |= {
            "emb.weight": (self.vocabulary, width),
            "head.weight": (self.vocabulary, width),
            f"{BLOCK}.att.time_maa_w1": (width, len(MIX_ORDER) * self.mix_rank),
            f"{BLOCK}.att.time_maa_w2": (len(MIX_ORDER), self.mix_rank, width),
            f"{BLOCK}.att.time_decay": (1, 1, inner),
            f"{BLOCK}.att.time_decay_w1": (width, self.decay_rank),
            f"{BLOCK}.att.time_decay_w2": (self.decay_rank, inner),
            f"{BLOCK}.att.time_faaaa": (heads, size),
            STATE: (heads, size, size),
            f"{BLOCK}.att.output.weight": (width, inner),
            f"{BLOCK}.ffn.key.weight": (self.feed_forward, width),
            f"{BLOCK}.ffn.receptance.weight": (width, width),
            f"{BLOCK}.ffn.value.weight": (width, self.feed_forward),
        }
        return {
            name.replace("{layer}", str(layer)): kinds[name]
            for layer in range(self.layers)
            for name in NAMES
            if layer == 0 or name not in FIRST_NORM
        }
