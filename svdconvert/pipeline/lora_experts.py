"""to-lora: under which names the factors of each module are written, with experts fused or by themselves."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from svdconvert.adapters.adapter_config import PER_EXPERT
from svdconvert.adapters.peft_files import target_modules
from svdconvert.adapters.stacked import Member, Stack, nesting_depth, stacks_of
from svdconvert.config.options import LoraOptions
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.placed import ExpertNames, Projection, expert_names, known_projections
from svdconvert.inputs.sources import Sources
from svdconvert.manifest.place import Rows
from svdconvert.pipeline.effects import refuse_idle_experts
from svdconvert.pipeline.scaling import as_pattern

Piece = tuple[str, Rows | None]
"""(module in the LoRA, rows of B or None for all)."""
Pieces = Mapping[str, tuple[Piece, ...]]
"""Module of the adapter -> what it is written as, for the modules that are no member of a stack."""
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True)
class LoraForm:
    """How the factors of an adapter are written."""

    pieces: Pieces
    stacks: tuple[Stack, ...] = ()
    """With the modules of the adapter as members; a stack's rank is the largest of its experts."""
    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    peft_type: str = "LORA"
    base_name: str | None = None
    """What the configuration calls the base; None for its name on the Hub, if it has one."""

    def rank_pattern(self, rank: int) -> dict[str, int]:
        """PEFT's rank_pattern if `rank` is the rank of all modules that are in no stack."""
        alone = [name for parts in self.pieces.values() for name, _ in parts]
        return rank_pattern(self.stacks, alone, rank)


def rank_pattern(stacks: Iterable[Stack], alone: Iterable[str], rank: int) -> dict[str, int]:
    """PEFT's rank_pattern for stacks next to the modules `alone`, which have the configuration's `rank`.

    These count too: a pattern for the experts' down_proj must not match a shared expert's.
    """
    ranks = dict.fromkeys(alone, rank) | {stack.parameter: stack.rank for stack in stacks}
    return as_pattern(ranks, rank)


def plan_form(
    delta: AdapterDelta, options: LoraOptions, ranks: Mapping[str, int], sources: Sources
) -> LoraForm:
    """The form that the options ask for; `ranks` has the rank of every module's factors.

    `sources` has the location of the untouched base, if it was given. Raises ArtifactError if it must be
    known how the model names its experts and it is not, RecipeError for `--experts each` without experts.
    """
    fused = set(delta.adapter.experts)
    single = {} if fused else _single_experts(delta, options, sources)
    refuse_idle_experts(options.experts, bool(fused or single))
    pieces = {module: ((module, None),) for module in delta.modules if module not in fused}
    if single and options.experts == "fused":
        pieces = {module: piece for module, piece in pieces.items() if module not in single}
        return _fused_form(pieces, _joined(delta, ranks, single), single)
    if fused and options.experts == "each":
        return _single_form(pieces, expert_names(delta, sources), fused)
    own = delta.adapter.config
    stacks = stacks_of(_shapes(delta, ranks))
    peft_type = PER_EXPERT if own.peft_type == PER_EXPERT else "LORA"
    return LoraForm(pieces, tuple(stacks), tuple(own.targets), tuple(own.parameters), peft_type)


def _shapes(delta: AdapterDelta, ranks: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """Module -> (out features, in features, rank), for the experts whose factors share tensors."""
    adapter = delta.adapter
    return {
        module: (adapter.shape(module, "lora_B")[0], adapter.shape(module, "lora_A")[1], ranks[module])
        for module in adapter.experts
    }


def _single_experts(delta: AdapterDelta, options: LoraOptions, sources: Sources) -> dict[str, Projection]:
    """Module -> projection, for the modules that are single experts.

    How the model names them is not asked for if they are written as they are.
    """
    known = {one.module: one for one in known_projections(delta)}
    if not known and options.experts == "fused" and any(_EXPERT.search(one) for one in delta.modules):
        known = {one.module: one for one in expert_names(delta, sources).projections}
    return {module: known[module] for module in delta.modules if module in known}


def _joined(delta: AdapterDelta, ranks: Mapping[str, int], single: Mapping[str, Projection]) -> list[Stack]:
    """The stacks of experts whose projections have factors of their own."""
    every = {one.module: one for one in known_projections(delta)} or single
    count: dict[str, int] = {}
    for one in (*every.values(), *single.values()):
        count[one.parameter] = max(count.get(one.parameter, 0), one.expert + 1)
    members: dict[str, list[Member]] = {}
    used: dict[str, int] = {}
    for module in sorted(single, key=lambda module: (single[module].expert, _first(single[module]))):
        one = single[module]
        offset = used.get(one.stacked, 0)
        members.setdefault(one.parameter, []).append(
            Member(module, one.expert, one.rows, ranks[module], offset)
        )
        used[one.stacked] = offset + ranks[module]
    shape = delta.adapter.shape
    return [
        Stack(
            parameter=parameter,
            experts=count[parameter],
            rank=max(used[one.stacked] for one in single.values() if one.parameter == parameter),
            shape=(
                max(_end(member, shape(member.module, "lora_B")[0]) for member in own),
                shape(own[0].module, "lora_A")[1],
            ),
            members=tuple(own),
            depth=nesting_depth(parameter, members),
        )
        for parameter, own in members.items()
    ]


def _first(one: Projection) -> int:
    return one.rows.first if one.rows else 0


def _end(member: Member, rows: int) -> int:
    """The number of rows that a matrix with this member has at least."""
    if member.rows is None:
        return rows
    return member.rows.first + (member.rows.size - 1) * member.rows.step + 1


def _fused_form(pieces: Pieces, stacks: list[Stack], single: Collection[str]) -> LoraForm:
    """The form with fused experts; `single` are the modules that the experts had by themselves."""
    names = {module.rpartition(".")[2] for module in single}
    dense = [module for module in pieces if module.rpartition(".")[2] in names]
    targets = target_modules([module for module in pieces if module not in dense], dense)
    parameters = [*(f"{module}.weight" for module in dense), *(stack.parameter for stack in stacks)]
    return LoraForm(pieces, tuple(stacks), tuple(targets), tuple(parameters))


def _single_form(pieces: Pieces, names: ExpertNames, fused: Collection[str]) -> LoraForm:
    """The form with each expert's factors by themselves; `fused` are the modules that have them together."""
    split: dict[str, tuple[Piece, ...]] = {module: () for module in fused}
    for one in names.projections:
        if one.stacked in split:
            split[one.stacked] += ((one.module, one.rows),)
    if absent := [module for module, parts in split.items() if not parts]:
        raise ArtifactError(
            f"the adapter has factors of {absent[0]}, which the base does not have; give the right --base"
        )
    written = [name for parts in split.values() for name, _ in parts]
    experts = {name.rpartition(".")[2] for name in written}
    is_dense = any(module.rpartition(".")[2] in experts for module in pieces)
    return LoraForm(
        {**pieces, **split},
        targets=tuple(target_modules([*pieces, *written], [])),
        peft_type="LORA" if names.fused_by_peft and not is_dense else PER_EXPERT,
    )
