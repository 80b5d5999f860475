"""No command works on weights of a directory that differ from the checksums in its svdconvert.json.

One byte in the data of a tensor is changed, in every file of weights of every kind of directory. Every
command must refuse it, unless it does not read that file: then it must do what it
does with the untouched one. The commands are those of the command tree, so one that is added without a row
here fails.
"""

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from svdconvert import ConvertOptions, LoraOptions, Run, SplitOptions, convert, decompose, merge, to_lora
from tests.laws.test_options import COMMANDS
from tests.program import content, svdconvert

pytestmark = pytest.mark.slow

RUN = Run(device="cpu", threads=1)
MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
INITIAL = f"pissa_init/{ADAPTER}"

# A kind of directory -> its files of weights.
FILES: dict[str, tuple[str, ...]] = {
    "merged": (MODEL,),
    "finetuned": (MODEL,),
    "rwkv": (MODEL,),
    "blinkdl": ("model.pth",),
    "decomposed": (MODEL, INITIAL),
    "codes": (MODEL, INITIAL),
    "unchanged": (f"lora_init/{ADAPTER}",),
    "trained": (ADAPTER, INITIAL),
    "lora": (ADAPTER,),
    "mlx": ("adapters.safetensors",),
    "rwkv-lora": ("rwkv_lora.pth",),
}
TEXT = ("merged", "finetuned")
PLAIN = (*TEXT, "rwkv", "blinkdl")
WITH_RESIDUAL = ("decomposed", "codes")
STARTS = (*WITH_RESIDUAL, "unchanged")

Words = list[object]
Row = Callable[[str, Path, Path, Path], list[Words]]
"""(kind, directory of that kind, the directory of all kinds, output) -> the command lines to try, if any."""


def _decompose(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    return [[given, "-o", out, "--rank", 2], [given, "-o", out, "--rank", 2, "--method", "lora"]]


def _train(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    words: Words = [given, "-o", out, "--data", here / "rows.jsonl", "--batch-size", 2, "--steps", 1]
    if kind in STARTS:
        return [words]
    return [[*words, "--rank", 2], [*words, "--method", "full"], [*words, "--rank", 2, "--method", "lora"]]


def _merge(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    if kind in TEXT:
        return [[here / "foreign", "--base", given, "-o", out]]
    if kind == "rwkv-lora":
        return [[given / "rwkv_lora.pth", "--alpha", 4, "--base", here / "rwkv.pth", "-o", out]]
    ways: list[Words] = [[given, "-o", out]]
    if kind == "trained":
        ways += [[given, "--from", "residual", "-o", out], [given, "--weights", 0.5, "-o", out]]
        ways += [[given, here / "lora", "-o", out]]
    if kind == "decomposed":
        ways += [[given, "--from", "residual", "-o", out], [here / "trained", "--residual", given, "-o", out]]
    return ways


def _to_lora(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    formats: list[Words] = [[], ["--format", "mlx"], ["--rank", 2], ["--format", "gguf"]]
    return [[given, "-o", out, *more] for more in formats]


def _convert(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    return [[given, "-o", out, "--layout", "fla"], [given, "-o", out, "--layout", "web-rwkv"]]


def _extract(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    other = here / "plain"
    ways: list[Words] = [[given, other, "-o", out], [other, given, "-o", out]]
    return ways + [
        [other, given, "-o", out, "--keep", "none", "--rank", 2],
        [given, other, "--plan", "--sketch"],
    ]


def _combine(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    if kind in PLAIN:
        other = here / "plain"
        return [
            [given, other, "-o", out],
            [other, given, "-o", out, "--method", "ties", "--base", other],
            [other, here / "lora-merged", "-o", out, "--method", "ties", "--base", given],
        ]
    return [[given, here / "lora", "-o", out], [here / "trained", given, "-o", out, "--method", "ties"]]


def _diff(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    other = here / ("plain" if kind in PLAIN else "lora")
    return [[given, other], [other, given]]


def _eval(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    words: Words = ["--tasks", "gsm8k", "--data", here / "questions.jsonl", "--max-new-tokens", 2, "-o", out]
    return [[given, *words], *([[here / "foreign", "--base", given, *words]] if kind in TEXT else [])]


def _chat(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    words: Words = ["--prompt", "what is 1 + 2 ?", "--max-new-tokens", 2]
    return [[given, *words], *([[here / "foreign", "--base", given, *words]] if kind in TEXT else [])]


def _verify(kind: str, given: Path, here: Path, out: Path) -> list[Words]:
    audit: Words = ["--merged", given, "--base", here / "plain", "--adapter", here / "trained"]
    return [[given], *([audit] if kind == "merged" else [])]


UNREAD = {
    *(("merge", "decomposed", file) for file in FILES["decomposed"]),  # an untrained adapter changes nothing
    *(
        (command, kind, MODEL)
        for command in ("merge", "to-lora", "combine", "diff")
        for kind in WITH_RESIDUAL
    ),
    *((command, "trained", INITIAL) for command in ("eval", "chat")),  # the adapter is put into its residual
}
"""(command, kind, file): some ways of the command do not read the file."""

ROWS: dict[str, Row] = {
    "decompose": _decompose,
    "train": _train,
    "merge": _merge,
    "to-lora": _to_lora,
    "convert": _convert,
    "extract": _extract,
    "combine": _combine,
    "diff": _diff,
    "eval": _eval,
    "chat": _chat,
    "verify": _verify,
}
OTHERS = {
    "push": "tests/hub/test_changed_bytes.py",
    "report": "tests/reports/test_report.py",
    "run": "it runs the commands above",
    "inspect": "it reads no weights",
    "list": "it reads no directory",
    "doctor": "it reads no directory",
}


def test_every_command_has_a_row() -> None:
    assert {*COMMANDS} == ROWS.keys() | OTHERS.keys()


@pytest.fixture(scope="module")
def places(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all kinds, with more of them."""
    home = tmp_path_factory.mktemp("more") / "kinds"
    shutil.copytree(here, home)
    convert(home / "rwkv.pth", home / "blinkdl", ConvertOptions(layout="blinkdl"), RUN)
    merge(home / "lora", home / "lora-merged", run=RUN)
    decompose(home / "plain", home / "codes", SplitOptions(rank=4, residual_format="nf4"), RUN)
    decompose(home / "plain", home / "unchanged", SplitOptions(rank=4, method="lora"), RUN)
    to_lora(home / "trained", home / "mlx", LoraOptions(format="mlx"), RUN)
    to_lora(home / "rwkv-trained", home / "rwkv-lora", LoraOptions(format="rwkv-peft"), RUN)
    return home


def change_a_byte(path: Path) -> None:
    """Change the lowest bits of one value in the middle of the largest tensor of a file."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".pth":
        with ZipFile(path) as archive:
            entry = max(archive.infolist(), key=lambda entry: entry.file_size)
        name, extra = struct.unpack_from("<2H", data, entry.header_offset + 26)
        begin = entry.header_offset + 30 + name + extra
        size = entry.file_size
    else:
        begin = 8 + int.from_bytes(data[:8], "little")
        size = len(data) - begin
    data[begin + size // 2 // 4 * 4] ^= 1
    path.write_bytes(data)


def outcome(command: str, words: Words, out: Path) -> tuple[int, str, object]:
    """(exit status, what was said, what was written without the manifest, else what was printed)."""
    ended = svdconvert(command, *words)
    files = content(out) if out.exists() else {}
    files.pop("svdconvert.json", None)
    files = {name: re.sub(rb'"seconds": [0-9.e-]+', b"", data) for name, data in files.items()}
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    return ended.status, " ".join(ended.err.split()), files or ended.out


CASES = [(command, kind, file) for command in ROWS for kind, files in FILES.items() for file in files]


@pytest.mark.parametrize(("command", "kind", "file"), CASES)
def test_a_changed_byte_is_refused_or_not_read(
    command: str, kind: str, file: str, places: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "given"
    out = tmp_path / "out"
    shutil.copytree(places / kind, changed)
    before = [outcome(command, words, out) for words in ROWS[command](kind, changed, places, out)]
    change_a_byte(changed / file)
    after = [outcome(command, words, out) for words in ROWS[command](kind, changed, places, out)]
    for (status, _, result), (status_after, said, result_after) in zip(before, after, strict=True):
        if status == 0 and status_after == 0:
            assert (command, kind, file) in UNREAD
            assert result_after == result
        elif status == 0:
            assert status_after == 1
            assert file in said
            assert "svdconvert.json lists" in said or (command == "verify" and "has changed" in said)


@pytest.mark.parametrize("command", ROWS)
def test_every_command_reads_some_kind(command: str, places: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    statuses = [
        outcome(command, words, out)[0]
        for kind in ("merged", "trained", "rwkv")
        for words in ROWS[command](kind, places / kind, places, out)[:1]
    ]
    assert 0 in statuses
