"""docs/families.md: what the sweep over all families found."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version

from tests.families.check import Family

_HEADER = """# Families

Written by `make families`, with transformers {transformers} and PEFT {peft}. For every model type that
`{kinds}` know, a tiny model with
random weights is made, and these must hold:

- the initial adapter, which stock PEFT loads onto the residual, gives the source's logits to 1e-4 of their
  spread;
- merging the untrained adapter from the base gives the base's bytes back;
- after training, `to-lora` on the base gives the logits of the merged model, to 1e-4 of their spread.

The last column names the layers in which the targets differ from those of PEFT's `all-linear`, which also
takes routers, vectors, towers and what is outside the repeated blocks. Experts are targets here, not there.

"""


def page(found: Sequence[Family]) -> str:
    """The page as Markdown."""
    kinds = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}
    used = [name for kind, name in kinds.items() if any(family.kind == kind for family in found)]
    parts = [
        _HEADER.format(transformers=version("transformers"), peft=version("peft"), kinds="` and `".join(used))
    ]
    for kind, name in kinds.items():
        if of_kind := [family for family in found if family.kind == kind]:
            parts.append(_section(name, of_kind))
    return "\n".join(parts)


def _section(name: str, found: Sequence[Family]) -> str:
    made = [family for family in found if family.made]
    good = [family for family in made if not family.fault]
    lines = [
        f"## {name}",
        "",
        f"{len(good)} of {len(made)} families of which a tiny model can be made.",
        "",
        "| model type | matrices | experts | logits at the start | LoRA | other than PEFT's all-linear |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *(_row(family) for family in good),
        "",
    ]
    if bad := [family for family in made if family.fault]:
        lines += ["Exceptions:", "", *(f"- `{family.model_type}`: {family.fault}" for family in bad), ""]
    if absent := [family for family in found if not family.made]:
        lines += [
            "No tiny model, and the reason:",
            "",
            *(f"- `{family.model_type}`: {family.fault.removeprefix('not made: ')}" for family in absent),
            "",
        ]
    return "\n".join(lines)


def _row(family: Family) -> str:
    start = "" if family.start is None else f"{family.start:.0e}"
    lora = "" if family.lora is None else f"{family.lora:.0e}"
    other = "; ".join(
        f"{word} {_short(names)}"
        for word, names in (("without", family.left), ("with", family.extra))
        if names
    )
    experts = str(family.experts) if family.experts else ""
    return f"| `{family.model_type}` | {family.matrices} | {experts} | {start} | {lora} | {other} |"


def _short(names: Iterable[str]) -> str:
    """The last components of module paths, without repetition."""
    return ", ".join(dict.fromkeys(f"`{name.rpartition('.')[2]}`" for name in names))
