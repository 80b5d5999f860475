"""Whatever a file is called, a command works or refuses in one sentence, and the terminal gets only text."""

import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from svdconvert import Run, SplitOptions, decompose
from tests import rwkv6
from tests.commands.test_extract import tuned_from
from tests.conftest import Build
from tests.program import Ended, svdconvert
from tests.reading import readable, write_sums

NAMES = {
    "a space": "two words ",
    "a newline": "two\nlines\r",
    "a colour": "\x1b[31mred\x07",
    "markup": "[bold]x[/bold]",
    "a closing tag": "[/i]",
    "an option": "-rank",
    "letters": "größe 模型",
    "from right to left": "a\u202eb",
    "no text": "half\udcff",
    "formats": "%s {0} $HOME *",
    "no room for .partial": "x" * 250,
    "too long": "x" * 300,
}
TRAINING = ["--steps", 1, "--max-length", 48, "--batch-size", 2, "--precision", "fp32"]
every_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


@pytest.fixture(scope="module")
def prepared(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `base`, `tuned`, `split` (of base), `rwkv.pth` and `sums.jsonl`."""
    home = tmp_path_factory.mktemp("prepared")
    base = readable(checkpoint("llama", dtype=torch.float32), home / "base")
    tuned_from(base, home / "tuned")
    decompose(base, home / "split", SplitOptions(rank=2, targets="attn.q"), Run(threads=1))
    rwkv6.save(rwkv6.random_model(layers=1, width=32, head=16), home / "rwkv.pth")
    write_sums(home / "sums.jsonl")
    return home


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which relative names may begin with a dash."""
    for path in prepared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ends_well(*words: object) -> Ended:
    """Run one command, which must succeed or refuse in one sentence, without control characters."""
    ended = svdconvert(*words)
    assert ended.status in (0, 1, 2), ended
    said = ended.out + ended.err
    assert "Traceback" not in said and "unexpected" not in said, ended
    odd = {character for character in said if unicodedata.category(character) in ("Cc", "Cf", "Cs")}
    assert odd <= {"\n"}, ended
    if ended.status == 1:
        assert [line[:12] for line in ended.err.splitlines()] == ["svdconvert: "], ended
    return ended


@every_name
@pytest.mark.parametrize(
    "words",
    [
        ["decompose", "base", "--rank", 2, "--targets", "attn.q"],
        ["train", "split", "--data", "sums.jsonl", *TRAINING],
        ["merge", "split"],
        ["to-lora", "split"],
        ["combine", "split", "split"],
        ["combine", "base", "base"],
        ["extract", "base", "tuned", "--rank", 2],
        ["convert", "rwkv.pth", "--layout", "hf"],
    ],
    ids=lambda words: str(words[0]),
)
def test_an_output_may_have_any_name(words: list[object], name: str, here: Path) -> None:
    ended = ends_well(*words, "-o", name)
    if ended.status == 0:
        assert (here / name / "svdconvert.json").is_file()
        for reader in ("inspect", "verify"):
            assert ends_well(reader, f"./{name}").status == 0
    else:
        assert not any(path.name.startswith(name) for path in here.iterdir())
        assert len(name) > 200 and ended.status == 1


@every_name
def test_an_input_may_have_any_name(name: str, here: Path) -> None:
    place = f"./{name}"
    commands = {
        "base": [
            ["decompose", place, "--rank", 2, "--targets", "attn.q"],
            ["combine", place, "base"],
            ["extract", place, "tuned"],
            ["diff", place, "tuned"],
        ],
        "split": [
            ["merge", place],
            ["to-lora", place],
            ["combine", place, "split"],
            ["train", place, "--data", "sums.jsonl", *TRAINING],
        ],
        "rwkv.pth": [["convert", place, "--layout", "hf"], ["inspect", place]],
        "sums.jsonl": [["train", "split", "--data", place, *TRAINING]],
    }
    for source, each in commands.items():
        target = here / name
        suffix = source[source.find(".") :] if "." in source else ""
        if len(name) <= 240:
            target = here / (name + suffix)
            shutil.copytree(here / source, target) if not suffix else shutil.copy(here / source, target)
        for number, words in enumerate(each):
            given = [f"{place}{suffix}" if word == place else word for word in words]
            out = [] if words[0] in ("inspect", "diff") else ["-o", f"out-{source}-{number}"]
            ended = ends_well(*given, *out)
            # The tokenizers library opens no path that is not UTF-8.
            is_refused = len(name) > 240 or ("\udcff" in name and given[0] == "train" and source == "split")
            assert (ended.status == 0) == (not is_refused), ended
        if len(name) <= 240:
            shutil.rmtree(target) if target.is_dir() else target.unlink()


@every_name
def test_a_name_that_is_not_there_is_refused(name: str, here: Path) -> None:
    for words in (
        ["inspect", f"./{name}"],
        ["verify", f"./{name}"],
        ["decompose", f"./{name}", "-o", "out"],
        ["decompose", "base", "-o", "out", "--recipe", f"./{name}"],
        ["merge", f"./{name}", "-o", "out"],
        ["merge", "split", "-o", "out", "--base", f"./{name}"],
        ["to-lora", f"./{name}", "-o", "out"],
        ["combine", "split", f"./{name}", "-o", "out"],
        ["extract", "base", f"./{name}", "-o", "out"],
        ["extract", f"./{name}", "base", "-o", "out"],
        ["diff", "base", f"./{name}"],
        ["verify", "--merged", f"./{name}", "--base", "base", "--adapter", "split"],
        ["inspect", f"./{name}", "--for", "vllm"],
        ["combine", "--config", f"./{name}", "-o", "out"],
        ["combine", "split", "split", "-o", "out", "--method", name],
        ["combine", "split", "split", "-o", "out", "--set", f"{name}=1"],
        ["train", f"./{name}", "-o", "out", "--data", "sums.jsonl"],
        ["train", "split", "-o", "out", "--data", f"./{name}"],
        ["convert", f"./{name}", "-o", "out", "--layout", "hf"],
        ["push", f"./{name}", "me/name"],
        ["decompose", "base", "-o", "out", "--method", name],
        ["decompose", "base", "-o", "out", "--targets", name],
        ["decompose", "base", "-o", "out", "--layout", name],
        ["decompose", name, "-o", "out"],
        [f"decompose{name}"],
        ["decompose", "base", "-o", "out", f"--{name}"],
        ["list", name],
        ["decompose", "base", "-o", "out", "--rank", name],
        ["push", "split", name],
    ):
        assert ends_well(*words).status in (1, 2)
    assert not (here / "out").exists() and not (here / "out.partial").exists()
