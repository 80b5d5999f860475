"""AWQ, version gemm: transposed 4-bit codes, eight output features in a word, interleaved.

w[o, i] = (q[i, o] - z[g, o]) * scales[g, o]. The nibble k of a word, from the lowest bits, belongs to its
output feature 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import CheckpointError, brief
from svdconvert.quantization.base import Coded, Parts, StorageFormat, per_row_of_blocks, require_shape
from svdconvert.quantization.packing import unpack

_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]  # of the output features of a word, in their order
_PER_WORD = 8


class Awq(StorageFormat):
    """Codes and zero points packed along the output features."""

    summary = "AWQ: 4-bit integers, eight in a word (version gemm)"
    methods = frozenset({"awq", "auto-round", "autoround"})

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every qweight of 32-bit words whose scales have eight times its columns.

        Raises CheckpointError for another version than gemm.
        """
        for name, info in source.infos.items():
            path = name.removesuffix("qweight")
            scale = source.infos.get(path + "scales")
            zeros = source.infos.get(path + "qzeros")
            if path == name or info.dtype != "I32" or len(info.shape) != 2 or scale is None or zeros is None:
                continue
            if len(scale.shape) == 2 and scale.shape[1] == info.shape[1] * _PER_WORD:
                yield _coded(path, info, scale, zeros, settings)
            elif settings.get("quant_method") == "awq":
                raise CheckpointError(
                    f"{name} is packed as AWQ version {brief(settings.get('version', 'gemv'))}, which is not "
                    "supported; give a checkpoint of version gemm"
                )

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """(q - z) * scale; the rows are output features, which are columns of the stored tensors."""
        words = slice(rows.start // _PER_WORD, -(-rows.stop // _PER_WORD))
        inner = slice(rows.start - words.start * _PER_WORD, rows.stop - words.start * _PER_WORD)
        group = coded.settings["group"]
        inputs = slice(0, coded.shape[1])
        codes_IO = _in_order(parts["codes"][:, words])[:, inner].float()
        zeros_GO = _in_order(parts["zeros"][:, words])[:, inner].float()
        scale_GO = parts["scale"][:, rows].float()
        codes_IO -= per_row_of_blocks(zeros_GO, inputs, group)
        return (codes_IO * per_row_of_blocks(scale_GO, inputs, group)).T

    def title(self, coded: Coded) -> str:
        """With the size of the groups."""
        return f"AWQ INT4 in groups of {coded.settings['group']}"


def _in_order(words: Tensor) -> Tensor:
    """The codes of (rows, words) in the order of their output features."""
    nibbles = unpack(words, 4, words.shape[1] * _PER_WORD).reshape(*words.shape, _PER_WORD)
    return nibbles[..., _NIBBLES].flatten(-2)


def _coded(
    path: str, codes: TensorInfo, scale: TensorInfo, zeros: TensorInfo, settings: Mapping[str, Any]
) -> Coded:
    inputs, words = codes.shape
    groups = scale.shape[0]
    if settings.get("bits", 4) != 4 or scale.dtype not in REAL or not groups or inputs % groups:
        raise CheckpointError(
            f"{scale.name} has the shape {list(scale.shape)}, which does not divide {codes.name} of the "
            f"shape {list(codes.shape)} into groups of 4-bit codes; fetch the checkpoint again"
        )
    require_shape(zeros, (groups, words))
    parts = {"codes": codes.name, "scale": scale.name, "zeros": zeros.name}
    shape = (words * _PER_WORD, inputs)
    return Coded(f"{path}weight", shape, parts, 4, settings={"group": max(1, inputs // groups)})


FORMAT = Awq()
