"""What a command prints when it is done: a short table and the commands that can follow."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from svdconvert.cli.answers import tell, tell_rows, wants_json
from svdconvert.cli.facts import (
    decomposed_facts,
    directory_facts,
    estimate_facts,
    merged_facts,
    published_facts,
    trained_facts,
)
from svdconvert.cli.pictures import pictures
from svdconvert.cli.terminal import folded, leads, plain, say, standard_output, stdout, wrapped
from svdconvert.cli.training_summary import is_text_model, loss_curve, training_rows
from svdconvert.config.counts import counted
from svdconvert.config.sizes import size_text
from svdconvert.layouts.loading import loading

if TYPE_CHECKING:
    from svdconvert.inputs.inspection import Inspection
    from svdconvert.manifest.results import Update
    from svdconvert.manifest.schema import Manifest, Matrix
    from svdconvert.pipeline.estimate import Estimate
    from svdconvert.pipeline.verify import Report
    from svdconvert.publish.upload import Published

_NO_BASE = (
    "the card names no model to load it on, because that is a local directory: push that too, and push this "
    "again with --base or --residual ORG/NAME, which writes a card that nobody has edited anew"
)
_BYTES = "_bytes"
"""How the name of a size ends in an inspection."""
_MANY = 12  # entries of a mapping that a screen shows


def summary(
    title: str,
    rows: Mapping[str, object],
    commands: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Print a short table of what was done, and the commands that can follow.

    With --json, `facts` go into the document instead: numbers as numbers, sizes in bytes, shares as
    fractions of 1.
    """
    tell(facts, summary=title, next=list(commands))
    if not leads() or wants_json():
        return
    show(Text(wrapped(plain(title), stdout), style="bold"))
    known = {plain(name): plain(value) for name, value in rows.items() if value is not None}
    width = max(map(len, known), default=0) + 2
    for name, value in known.items():
        show(Text(f"{name:{width}}", style="dim").append(wrapped(value, stdout, width), style="not dim"))
    for number, command in enumerate(commands):
        show(
            Text("next" if number == 0 else "  or", style="dim").append(
                f"  {plain(command)}", style="not dim"
            )
        )


def show_line(text: str) -> None:
    """Print one line of text on standard output."""
    show(Text(plain(text)))


def show(content: Table | Text) -> None:
    """Print on standard output, which --json keeps for its document. Raises OutputError if that fails."""
    if wants_json():
        return
    with standard_output():
        stdout.print(content)


def _then(*commands: str) -> list[str]:
    return [command for command in commands if command]


def listing(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with headings. No number is cut or separated from its unit.

    If the lines are too long, cells are broken at their commas and brackets; if that is not enough, the
    columns stand below each other.
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    if _table_width([columns, *cells]) > stdout.width:
        broken = [[_BREAKS.sub("\n", cell) for cell in row] for row in cells]
        heads = [_HEAD_BREAKS.sub("\n", head) for head in columns]
        if _table_width([heads, *broken]) > stdout.width:
            _show_stacked(columns, cells)
            return
        columns = heads
        cells = broken
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in columns:
        table.add_column(head, no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    show(table)


_BREAKS = re.compile(r"(?<=,) | (?=\()|(?<=->) ")
_HEAD_BREAKS = re.compile(r" (?!%)")
_GAP = 2  # spaces between two columns


def _table_width(rows: Sequence[Sequence[str]]) -> int:
    widths = [
        max(cell_len(line) for cell in column for line in cell.split("\n"))
        for column in zip(*rows, strict=True)
    ]
    return sum(widths) + _GAP * (len(widths) - 1)


def _show_stacked(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as a paragraph: its first cell, and below it the others with their headings."""
    width = max(map(len, columns)) + 2
    for name, *others in rows:
        show(Text(name, style="bold"))
        for head, cell in zip(columns[1:], others, strict=True):
            if cell:
                text = folded(cell, width + 2)
                show(Text(f"  {head:{width}}", style="dim").append(text, style="not dim"))


def catalogue(rows: Sequence[Mapping[str, Any]], more: str) -> None:
    """Print what each method or layout is in a sentence, and the command that shows `more` of one."""
    tell_rows(list(rows))
    names = [plain(next(iter(row.values()))) for row in rows]
    width = max(map(len, names)) + 2
    for name, row in zip(names, rows, strict=True):
        sentence = plain(list(row.values())[1]).partition(". ")[0].removesuffix(".")
        if groups := row.get("groups"):
            sentence += f" (group {', '.join(groups)})"
        show(Text(f"{name:{width}}", style="bold").append(folded(sentence, width), style="not bold"))
    show(Text("next", style="dim").append(f"  {more}", style="not dim"))


def described(row: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Print all that is known of one method or layout; `words` are headings and texts of its row."""
    tell_rows([row])
    shown = {plain(label): plain(text) for label, text in words.items() if text and text != "-"}
    width = max(map(len, shown)) + 2
    for label, text in shown.items():
        show(Text(f"{label:{width}}", style="dim").append(folded(text, width), style="not dim"))


def show_estimate(source: object, plan: "Estimate") -> None:
    """Print the estimate of a decomposition."""
    listing(
        ("role", "shape", "rank", "matrices", "trained parameters"),
        [
            (row.role, " x ".join(map(str, row.shape)), row.rank, row.count, f"{row.parameters:,}")
            for row in plan.rows
        ],
    )
    summary(
        f"decompose {source} would",
        {
            "read": size_text(plan.read),
            "write": f"{size_text(plan.written)} in {counted(len(plan.files), 'file')}",
            "peak memory": f"about {size_text(plan.memory)}",
            "take": f"about {plan.seconds:.0f} s",
            "note": "; ".join(plan.remarks) or None,
        },
        facts=estimate_facts(source, plan),
    )


def show_decomposed(out_dir: object, manifest: "Manifest") -> None:
    """Print the result of decompose."""
    matrices = list(manifest.matrices.values())
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    experts = manifest.options.get("experts") == "each"
    exact = sum(matrix.engine == "exact" for matrix in matrices)
    summary(
        f"decomposed into {out_dir}",
        {
            "method": f"{manifest.method}, rank {_ranks(matrices)}, {len(matrices)} matrices",
            "energy in the adapter": f"{sum(energies) / len(energies):.1%} (mean)" if energies else None,
            "largest error as stored": f"{max(matrix.error for matrix in matrices):.2e}",
            **_error_reductions(matrices),
            "experts": "each one by itself, for inference engines" if experts else None,
            "SVD": f"{len(matrices) - exact} fast, {exact} exact" if energies else None,
        },
        [f"svdconvert train {out_dir} -o TRAINED --data FILE", f"svdconvert verify {out_dir}"],
        decomposed_facts(out_dir, manifest),
    )


def _error_reductions(matrices: Sequence["Matrix"]) -> dict[str, str]:
    """By how much a 4-bit residual's errors are below those of plain NF4, and which start was better."""
    rows = {}
    for norm, attribute in {"Frobenius": "reduction", "nuclear": "nuclear_reduction"}.items():
        roles: dict[str, list[float]] = {}
        for matrix in matrices:
            if (value := getattr(matrix.quantised, attribute, None)) is not None:
                roles.setdefault(matrix.role, []).append(value)
        total = [value for values in roles.values() for value in values]
        means = {role: sum(values) / len(values) for role, values in roles.items()}
        if total:
            rows[_below(norm)] = f"{sum(total) / len(total):.1%} (mean): {_by_role(means)}"
    starts = [matrix.quantised.start for matrix in matrices if matrix.quantised and matrix.quantised.start]
    if starts:
        rows["better start"] = ", ".join(f"{start} {starts.count(start)}" for start in sorted(set(starts)))
    return rows


def _below(norm: str) -> str:
    return f"below NF4's error, {norm}"


def _by_role(means: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {mean:.1%}" for role, mean in means.items() if role != "all")


def _ranks(matrices: Sequence["Matrix"]) -> str:
    """The rank, such as "4", or the range "4 to 16" if patterns give several ranks."""
    least = min(matrix.rank for matrix in matrices)
    most = max(matrix.rank for matrix in matrices)
    return str(most) if least == most else f"{least} to {most}"


def show_merged(out_dir: object, manifest: "Manifest") -> None:
    """Print the result of merge."""
    from svdconvert.manifest.results import MergeResult

    assert isinstance(manifest.result, MergeResult)
    side = manifest.result.side
    origin = manifest.residual if side == "residual" else manifest.base
    summary(
        f"merged into {out_dir}",
        {
            "from": f"the {side} {origin.location if origin else ''}",
            "tensors": f"{len(manifest.checksums)} in {counted(len(manifest.files_of('model')), 'file')}",
            "format": "quantised, as the source" if manifest.options.get("keep_format") else None,
            "update as stored": _update(manifest.result.update),
        },
        _then(f"svdconvert inspect {out_dir}", loading(manifest.layout, out_dir)),
        merged_facts(out_dir, manifest),
    )


def show_converted(out_dir: object, manifest: "Manifest") -> None:
    """Print the result of convert."""
    files = manifest.files_of("model")
    summary(
        f"converted into {out_dir}",
        {
            "layout": manifest.layout,
            "tensors": f"{len(manifest.checksums)} in {', '.join(files) if len(files) == 1 else len(files)}",
            "values": "unchanged" if manifest.options["dtype"] == "auto" else manifest.options["dtype"],
        },
        _then(f"svdconvert inspect {out_dir}", loading(manifest.layout, out_dir)),
        directory_facts(out_dir, manifest),
    )


def _update(update: "Update | None") -> str | None:
    if update is None:
        return None
    return f"cosine {update.cosine:.4f} with the intended one, {update.kept:.1%} of it kept"


def show_published(out_dir: object, repository: str, done: "Published", *, after: bool = False) -> None:
    """Print the address of a published directory, its size and what was not sent.

    `after` another command's summary, the facts are one object in the document of that command.
    """
    facts = published_facts(out_dir, repository, done)
    if after:
        tell(push=facts)
        if wants_json():
            return
    unsent = [*done.unsent[:3], *([f"{len(done.unsent) - 3} more"] if len(done.unsent) > 3 else [])]
    summary(
        f"pushed {out_dir} to {repository}" if done.changed else f"{repository} held all of {out_dir}",
        {
            "see": done.url,
            "files": f"{done.files}, {size_text(done.nbytes)}",
            "left here": ", ".join(unsent) or None,
            "note": _NO_BASE if done.lacks_base else None,
        },
        [f"svdconvert inspect {repository}"],
        facts,
    )


def show_report(report: "Report") -> None:
    """Print the report of verify."""
    for fault in report.faults[:20]:
        say(fault)
    rows: dict[str, object] = {"stored tensors": f"{report.tensors} compared with their checksums"}
    if report.matrices:
        rows["base"] = report.base
        rows["matrices"] = f"{report.matrices} recomputed, largest relative error {report.worst:.2e}"
        rows["exactly reconstructed"] = f"{report.exact:.4f} of the entries, from the stored files alone"
        rows |= {
            _below(norm): f"{roles['all']:.1%} (mean): {_by_role(roles)}"
            for norm, roles in report.reductions.items()
        }
    elif report.kind == "decomposed":
        rows["base"] = "not found: only the checksums were compared; give its location with --base"
    elif report.base:
        rows["base"] = f"{report.base}, the right one by a quick comparison"
    rows["evaluations"] = f"{report.evaluations} compared with their answers" if report.evaluations else None
    state = "agrees with its manifest" if report.passed else f"has {counted(len(report.faults), 'fault')}"
    facts = {**asdict(report), "directory": str(report.directory), "passed": report.passed}
    summary(f"{report.directory} {state}", rows, facts=facts)


def show_inspection(found: "Inspection") -> None:
    """Print the description of a directory."""
    details = {**found.details, "evaluations": [_score(one) for one in found.details.get("evaluations", ())]}
    rows = {_label(name): _readable(value, name) for name, value in details.items() if value}
    summary(f"{found.directory} is {found.summary}", {"kind": found.kind, **rows}, found.next)
    tell(asdict(found))
    if stdout.is_terminal:
        for line in pictures(found, stdout.width):
            show_line(line)


def _score(result: Mapping[str, Any]) -> str:
    """A result of `eval` in an inspection: gsm8k 12.3 % (10.1 % to 14.9 %)."""
    name, score = list(result.items())[1]
    low, high = result["interval"] or (None, None)
    spread = f" ({low:.1%} to {high:.1%})" if low is not None else ""
    rows = f", the first {result['rows']} rows" if result["limit"] is not None else ""
    whose = "" if result["of_these_weights"] else ", of other weights"
    return f"{result['task']} {name} {score:.1%}{spread}{rows}{whose}"


def _label(name: str) -> str:
    return name.removesuffix(_BYTES).replace("_", " ")


def _readable(value: object, name: str = "") -> str:
    """A value of an inspection, formatted for reading."""
    if isinstance(value, int) and name.endswith(_BYTES):
        return size_text(value)
    if isinstance(value, Mapping) and len(value) > _MANY:
        return f"{len(value)} values, shown with --json"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_readable(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return (", " if any(" " in str(one) for one in value) else ",").join(map(_readable, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_trained(out_dir: object, manifest: "Manifest") -> None:
    """Print what a training run has changed, with its curve on a terminal."""
    commands = [loading(manifest.layout, out_dir)]
    if manifest.kind == "trained":  # a LoRA keeps all of the training, a merge what its dtype can hold
        commands = [f"svdconvert to-lora {out_dir} -o LORA", f"svdconvert merge {out_dir} -o MERGED"]
    rows = training_rows(Path(str(out_dir)), manifest)
    curve = loss_curve(manifest, stdout) if stdout.is_terminal else None
    chat = [f"svdconvert chat {out_dir}"] if is_text_model(manifest) else []
    summary(
        f"trained into {out_dir}",
        {**rows, "loss curve": curve},
        [*commands, *chat],
        trained_facts(out_dir, manifest),
    )
