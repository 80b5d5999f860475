"""How the experts of a family are stored in its files, and which parameters they are at run time."""

from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.checkpoint.parts import index_of
from svdconvert.manifest.place import Place, Rows


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a family.

    The files have a matrix for each expert and projection (`...experts.3.w1.weight`), or a stacked tensor for
    each parameter at run time (`...experts.gate_up_proj`).
    """

    parameters: Mapping[str, tuple[str, ...]]
    """Parameter at run time -> the projections that it combines, as the files name them.

    In the order in which the module registers its parameters: PEFT nests its wrappers in that order.
    """
    renamed: tuple[str, str] = ("", "")
    """(part of the path in the files, what stands there at run time)."""
    transposed: bool = False
    """True if stacked tensors are (experts, in, out)."""
    interleaved: bool = False
    """True if the rows of combined projections alternate."""
    fused_by_peft: bool = False
    """True if PEFT, when it loads factors of single experts, turns them into factors of the parameters."""

    def place(self, path: str, expert: int, name: str) -> tuple[str, Place]:
        """(module, place) of the tensor `name` of an expert; `path` is that of its tensor, without .weight.

        The rows of a projection that is stored by itself are not known yet.
        """
        stacked = index_of(name) is not None
        holder, _, matrix = path.rpartition(".")
        holder = holder if stacked else holder.rpartition(".")[0]
        parameter = next(one for one, names in self.parameters.items() if matrix in (one, *names))
        names = self.parameters[parameter]
        combined = stacked and len(names) > 1
        place = Place(
            parameter=f"{holder.replace(*self.renamed)}.{parameter}",
            expert=expert,
            rows=None if stacked or len(names) == 1 else Rows(names.index(matrix), 0),
            transposed=stacked and self.transposed,
            projections=names if combined else (),
            interleaved=combined and self.interleaved,
        )
        return f"{holder}.{expert}.{parameter if combined else names[0] if stacked else matrix}", place
