"""extract: which matrices become factors and which tensors are compared, planned from headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.config.options import RANK_RULES, ExtractOptions
from svdconvert.errors import ArtifactError, TargetError
from svdconvert.inputs.adapted_tensors import is_head
from svdconvert.inputs.model_pair import ModelPair
from svdconvert.inputs.storage_format import refuse_codes
from svdconvert.layouts.base import Layout, Slot

DEFAULT_RANK = 64
_SPARE = 4  # times the mean rank of a budget, that a matrix gets room for at first
_LEAST = 16


@dataclass(frozen=True)
class ExtractPlan:
    """What will be read and what may be written."""

    pair: ModelPair
    layout_name: str
    layout: Layout
    options: ExtractOptions
    slots: Mapping[str, Slot]
    """The matrices whose changes become factors, by tensor; without those that are known to be equal."""
    others: tuple[str, ...]
    """All other common tensors that may differ: they are kept in full or left out."""
    keepable: frozenset[str]
    """Those of `others` that are kept if they changed."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors of the base."""
        return self.pair.base.source.infos

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every matrix, if it does not follow from the weights."""
        given = any(getattr(self.options, rule) is not None for rule in RANK_RULES)
        return self.options.rank if given else DEFAULT_RANK

    @property
    def per_expert(self) -> bool:
        """True if single experts of a mixture get factors."""
        return any(slot.expert is not None for slot in self.slots.values())

    @property
    def nbytes(self) -> int:
        """Bytes that are read of both checkpoints."""
        names = [*self.slots, *self.others]
        return sum(model.source.infos[name].nbytes for model in self.pair.models for name in names)

    def first_ranks(self) -> dict[str, int]:
        """The ranks for which a budget's matrices get factors at first, by tensor."""
        budget = self.options.rank_budget or 0
        mean = -(-budget // max(1, len(self.slots)))
        room = max(_LEAST, _SPARE * mean)
        return {name: min(room, budget, *self.infos[name].shape) for name in self.slots}


def plan_extraction(pair: ModelPair, options: ExtractOptions) -> ExtractPlan:
    """Plan from headers. Raises ArtifactError or TargetError if the checkpoints do not match."""
    name, layout = pair.base.layout(options.layout)
    pair = pair.divided(layout)
    infos = pair.base.source.infos
    selected = layout.select(infos, options.targets)
    _refuse_mismatches(pair, layout, selected, options)
    for model in pair.models:
        refuse_codes(model.path, model.config, model.source.infos, selected)
    _refuse_shapes(infos, selected)
    _refuse_joined(selected)
    known = layout.slots(infos)
    common = pair.common()
    others = tuple(tensor for tensor in common if tensor not in selected and tensor not in pair.equal)
    keepable = frozenset(tensor for tensor in others if tensor not in known and options.keep == "changed")
    slots = {tensor: slot for tensor, slot in selected.items() if tensor not in pair.equal}
    if not slots:
        raise ArtifactError(
            f"{_names(pair)} have equal matrices, by the checksums of their files: {_NOTHING}"
        )
    _refuse_high_ranks(infos, slots, options)
    return ExtractPlan(pair, name, layout, options, slots, others, keepable)


_NOTHING = "there is nothing to extract; check that both names are the right ones"


def refuse_nothing(plan: ExtractPlan, changed: int) -> None:
    """Raise ArtifactError if no target matrix changed."""
    if not changed:
        raise ArtifactError(
            f"none of the {len(plan.slots)} target matrices differs between {_names(plan.pair)}: {_NOTHING}, "
            "and that --targets includes what was trained"
        )


def _names(pair: ModelPair) -> str:
    return f"{pair.base.path} and {pair.tuned.path}"


def _refuse_shapes(infos: Mapping[str, TensorInfo], selected: Mapping[str, Slot]) -> None:
    for name in selected:
        if len(infos[name].shape) != 2 or 0 in infos[name].shape:
            raise TargetError(
                f"{name} has the shape {infos[name].shape} and is not a matrix; choose other targets"
            )


def _refuse_high_ranks(
    infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], options: ExtractOptions
) -> None:
    """Raise TargetError for a rank, or a sum of ranks, that the matrices do not have."""
    ranks = [min(infos[name].shape) for name in slots]
    if options.rank is not None and options.rank > max(ranks):
        raise TargetError(
            f"rank {options.rank} is above what the {len(ranks)} targets have; give --rank {max(ranks)} or "
            "less"
        )
    if options.rank_budget is not None and options.rank_budget > sum(ranks):
        raise TargetError(
            f"--rank-budget {options.rank_budget} is more than all ranks of the {len(ranks)} targets "
            f"together; give {sum(ranks)} or less"
        )


def _refuse_joined(selected: Mapping[str, Slot]) -> None:
    """Raise TargetError for a matrix that is only some rows of one at run time, outside of experts."""
    for name, slot in selected.items():
        if slot.place is not None and slot.place.expert is None and slot.place.rows is not None:
            raise TargetError(
                f"{name} is a part of {slot.place.parameter} at run time, which extract does not join; "
                "choose other --targets"
            )


def _refuse_mismatches(
    pair: ModelPair, layout: Layout, selected: Mapping[str, Slot], options: ExtractOptions
) -> None:
    """Raise ArtifactError if a tensor that the LoRA would have to hold has no counterpart."""
    found = pair.mismatches()
    if not pair.common():
        raise ArtifactError(f"{_names(pair)} have no tensor in common; give two checkpoints of one model")
    tuned = layout.slots(pair.tuned.source.infos)
    matrices = [name for name in found if name in selected or (name in tuned and name not in selected)]
    if matrices:
        raise ArtifactError(
            f"{found[matrices[0]]} ({len(matrices)} such matrices); give two checkpoints of one model"
        )
    if options.keep == "none" or not found:
        return
    name = next(iter(found))
    if is_vocabulary(name) and name in pair.base.source.infos and name in pair.tuned.source.infos:
        raise ArtifactError(
            f"{found[name]}: the vocabulary was resized, and a LoRA cannot add rows; leave embeddings and "
            "head out with --keep none, or resize the base first (resize_token_embeddings of transformers)"
        )
    raise ArtifactError(f"{found[name]} ({len(found)} such tensors); leave it out with --keep none")


def is_vocabulary(name: str) -> bool:
    """True for the tensor of embeddings or of a head."""
    module = name.removesuffix(".weight")
    return is_head(module) or module.rpartition(".")[2] in _EMBEDDINGS


_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in", "emb")
