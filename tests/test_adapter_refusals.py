"""Adapters, trained directories, manifests and data that do not fit are refused in one sentence."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdconvert.config.progress import Progress
from svdconvert.errors import SvdConvertError
from svdconvert.output.uncached import UncachedWriter
from tests.conftest import Build
from tests.program import content, refused, succeeded, svdconvert
from tests.reading import readable, write_sums
from tests.stock import WEIGHTS, trained_from
from tests.tiny import SHARDED

MANIFEST = "svdconvert.json"


@pytest.fixture
def base(checkpoint: Build, tmp_path: Path) -> Path:
    return readable(checkpoint("llama"), tmp_path / "base")


@pytest.fixture
def pissa(base: Path, tmp_path: Path) -> Path:
    """A DECOMPOSED directory that a test may damage."""
    succeeded("decompose", base, "-o", tmp_path / "pissa", "--rank", 4)
    return tmp_path / "pissa"


@pytest.fixture
def adapter(pissa: Path, tmp_path: Path) -> Path:
    """What PEFT would have written after training on `pissa`."""
    return trained_from(pissa, tmp_path / "adapter")


@pytest.fixture
def trained(pissa: Path, adapter: Path, tmp_path: Path) -> Path:
    """A TRAINED directory that no training wrote."""
    shutil.copytree(pissa / "pissa_init", adapter / "pissa_init")
    manifest = json.loads((pissa / MANIFEST).read_text())
    residual = manifest["base"] | {"location": str(pissa)}
    (adapter / MANIFEST).write_text(
        json.dumps(manifest | {"kind": "trained", "files": {}, "residual": residual})
    )
    return adapter


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("command", ["merge", "to-lora"])
def test_a_trained_directory_without_its_initial_adapter_is_refused(
    command: str, trained: Path, tmp_path: Path
) -> None:
    shutil.rmtree(trained / "pissa_init")
    refused(command, trained, "-o", tmp_path / "out", words=[trained / "pissa_init", "is missing", "--init"])
    succeeded(command, trained, "-o", tmp_path / "out", "--init", tmp_path / "pissa" / "pissa_init")


@pytest.mark.parametrize("command", ["merge", "to-lora"])
def test_an_initial_adapter_of_another_shape_is_refused(
    command: str, trained: Path, base: Path, tmp_path: Path
) -> None:
    succeeded("decompose", base, "-o", tmp_path / "other", "--rank", 4, "--targets", "mlp")
    words = [tmp_path / "other" / "pissa_init", "is not the initial adapter of", "--init"]
    refused(
        command, trained, "-o", tmp_path / "out", "--init", tmp_path / "other" / "pissa_init", words=words
    )
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_headers_is_refused(trained: Path, checkpoint: Build, tmp_path: Path) -> None:
    other = checkpoint("llama", dtype=torch.float32)
    words = [
        other,
        "is not the model that the adapter was made for",
        "shapes or element types",
        "give the right one",
    ]
    refused("merge", trained, "-o", tmp_path / "out", "--base", other, words=words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensor", ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_base_with_other_values_is_refused(tensor: str, trained: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors[tensor][0, 1] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = [other, tensor, "the adapter was made for"]
    refused("merge", trained, "-o", tmp_path / "out", "--base", other, words=words)
    assert not (tmp_path / "out").exists()


def test_a_base_that_changed_in_place_is_refused(trained: Path, base: Path, tmp_path: Path) -> None:
    edit(base / "config.json", rms_norm_eps=0.5)
    words = [base, "its config.json differs"]
    refused("merge", trained, "-o", tmp_path / "out", "--from", "base", words=words)


def test_a_missing_base_is_asked_for(trained: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    refused(
        "merge", trained, "-o", tmp_path / "out", "--from", "base", words=[base, "is not found", "--base"]
    )
    (tmp_path / "pissa").rename(tmp_path / "moved too")
    refused(
        "merge", trained, "-o", tmp_path / "out", words=["neither the base nor the residual", "--residual"]
    )
    succeeded("merge", trained, "-o", tmp_path / "out", "--base", tmp_path / "moved")


def test_an_adapter_for_another_model_is_refused(adapter: Path, checkpoint: Build, tmp_path: Path) -> None:
    other = checkpoint("bert")
    words = [adapter, "adapts model.layers.0", "does not have", "give the model"]
    start = tmp_path / "pissa" / "pissa_init"
    refused("merge", adapter, "-o", tmp_path / "out", "--base", other, "--init", start, words=words)


def test_an_adapter_that_changed_its_base_needs_its_initial_adapter(adapter: Path, tmp_path: Path) -> None:
    edit(adapter / "adapter_config.json", init_lora_weights="pissa_niter_4")
    for command in ("merge", "to-lora"):
        words = [adapter, "initialised as pissa_niter_4", "is unknown", "--residual", "--init"]
        refused(command, adapter, "-o", tmp_path / "out", words=words)


CONFIGS: dict[str, tuple[str, list[str]]] = {
    "not JSON": ("{oops", ["is not readable JSON", "restore the file"]),
    "a list": ("[]", ["is not a JSON object", "restore the file"]),
    "empty object": ("{}", ["is of the peft_type None"]),
    "rank that is a word": (
        '{"peft_type": "LORA", "lora_alpha": 4, "r": "four"}',
        ["has r 'four', which must be an integer", "restore the file"],
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
@pytest.mark.parametrize("command", ["merge", "to-lora"])
def test_a_corrupted_adapter_config_is_refused(
    command: str, fault: str, trained: Path, tmp_path: Path
) -> None:
    text, words = CONFIGS[fault]
    (trained / "adapter_config.json").write_text(text)
    refused(command, trained, "-o", tmp_path / "out", words=[trained / "adapter_config.json", *words])


def test_a_truncated_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    whole = (trained / WEIGHTS).read_bytes()
    (trained / WEIGHTS).write_bytes(whole[:-5])
    refused("to-lora", trained, "-o", tmp_path / "out", words=[trained / WEIGHTS, "is truncated"])


MANIFESTS: dict[str, tuple[str, list[str]]] = {
    "not JSON": ("{", ["is not readable JSON", "restore the file"]),
    "a list": ("[1]", ["is not a JSON object", "restore the file"]),
    "of a later format": ('{"format": 99}', ["has format 99", "use the version that wrote it"]),
    "without content": ('{"format": 1}', ["is damaged", "restore the file"]),
}


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_corrupted_manifest_is_refused_by_every_command(fault: str, pissa: Path, tmp_path: Path) -> None:
    text, words = MANIFESTS[fault]
    (pissa / MANIFEST).write_text(text)
    for command in (
        ["verify"],
        ["inspect"],
        ["merge", "-o", tmp_path / "o"],
        ["to-lora", "-o", tmp_path / "o"],
    ):
        refused(*command, pissa, words=[pissa / MANIFEST, *words])


def mutations(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of a manifest in each of which one value is replaced or missing."""
    for key in value:
        yield {name: inner for name, inner in value.items() if name != key}
        for other in (None, 7, "x", [], {}, ["x"], {"x": 1}):
            yield value | {key: other}
    for key in ("base", "matrices"):
        inner = value[key]
        keys = list(inner)[:3] if key == "matrices" else list(inner)
        for name in keys:
            for other in (None, 7, "x", [1], {"y": 2}):
                yield value | {key: inner | {name: other}}


@pytest.mark.slow
def test_a_damaged_manifest_never_causes_a_traceback(pissa: Path, tmp_path: Path) -> None:
    whole = json.loads((pissa / MANIFEST).read_text())
    seen = 0
    for number, content_ in enumerate(mutations(whole)):
        (pissa / MANIFEST).write_text(json.dumps(content_))
        out = tmp_path / f"out{number}"
        for command in (["verify"], ["inspect"], ["merge", "-o", out]):
            ended = svdconvert(*command, pissa)
            assert ended.status in (0, 1), ended
            seen += ended.status
    assert seen > 100


DATA: dict[str, tuple[str, list[str]]] = {
    "missing": ("", ["there is no such file"]),
    "empty": ("\n", []),
    "without a known field": (
        '{"a": "b", "c": "d"}\n',
        ["row 1", "none of the known field sets", "--prompt-field"],
    ),
    "with a field missing later": (
        '{"question": "1", "answer": "1"}\n{"question": "1"}\n',
        ["row 2", "it has no answer"],
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_data_that_cannot_be_used_is_refused_and_nothing_is_left(
    fault: str, pissa: Path, tmp_path: Path
) -> None:
    text, words = DATA[fault]
    data = tmp_path / "rows.jsonl"
    if text:
        data.write_text(text)
    before = content(tmp_path)
    refused("train", pissa, "-o", tmp_path / "out", "--data", data, "--steps", 1, words=[data, *words])
    assert content(tmp_path) == before


def test_train_says_what_is_missing_or_wrong(
    pissa: Path, adapter: Path, checkpoint: Build, tmp_path: Path
) -> None:
    rows = write_sums(tmp_path / "sums.jsonl")
    out = tmp_path / "out"
    refused("train", pissa, "-o", out, words=["nothing to train on", "data"])
    refused(
        "train", pissa, "-o", out, "--data", rows, "--lr", -1, words=["train: --lr is -1.0", "greater than 0"]
    )
    refused(
        "train",
        pissa,
        "-o",
        out,
        "--data",
        rows,
        "--steps",
        1,
        "--epochs",
        1,
        words=["--steps and --epochs"],
    )
    refused(
        "train",
        pissa,
        "-o",
        out,
        "--data",
        rows,
        "--device",
        "abacus",
        words=["device abacus", "cpu or auto"],
    )
    refused(
        "train",
        pissa,
        "-o",
        out,
        "--data",
        rows,
        "--prompt-field",
        "q",
        words=["--prompt-field and --response-field"],
    )
    refused(
        "train", checkpoint("llama"), "-o", out, "--data", rows, "--rank", 4, words=["holds no tokenizer"]
    )
    refused("train", pissa, "-o", adapter, "--data", rows, words=[adapter, "is not empty"])
    assert not out.exists()


@pytest.mark.processes
def test_after_a_failed_write_the_same_command_finishes_the_output(base: Path, tmp_path: Path) -> None:
    command = ["decompose", base, "--rank", 1, "--max-shard-size", "4KB", "--threads", 1, "-o"]
    succeeded(*command, tmp_path / "anew")
    # The weights are smaller than the limit, the manifest is not.
    limit = max(file.stat().st_size for file in (tmp_path / "anew").rglob("*.safetensors"))
    assert (tmp_path / "anew" / MANIFEST).stat().st_size > limit
    limited = (
        "import resource, sys; from svdconvert.cli.app import app; import svdconvert.commands.decompose;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); app(sys.argv[1:])"
    )
    program = [sys.executable, "-c", limited, *map(str, command), str(tmp_path / "out")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path / 'out.partial'}" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert "correct that and repeat the command" in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "journal.jsonl").stat().st_size > 1000
    succeeded(*command, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_a_full_disk_is_reported_in_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UncachedWriter.write
    left = [20]

    def write(self: UncachedWriter, descriptor: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, descriptor, data, offset)

    monkeypatch.setattr(UncachedWriter, "write", write)
    refused(
        "decompose",
        base,
        "-o",
        tmp_path / "out",
        "--rank",
        4,
        words=["out.partial", "No space left on device"],
    )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out.partial"}
    left[0] = 10**9
    succeeded("decompose", base, "-o", tmp_path / "out", "--rank", 4)


def test_another_command_does_not_continue_an_unfinished_output(base: Path, tmp_path: Path) -> None:
    from svdconvert import Run, SplitOptions, decompose

    def stop(progress: Progress) -> None:
        if progress.done:
            raise SvdConvertError("enough")

    with pytest.raises(SvdConvertError, match="enough"):
        decompose(base, tmp_path / "out", SplitOptions(rank=4), Run(track=stop))
    left = content(tmp_path)
    words = ["out.partial", "another run", "--overwrite"]
    refused("decompose", base, "-o", tmp_path / "out", "--rank", 5, words=words)
    assert content(tmp_path) == left
    succeeded("decompose", base, "-o", tmp_path / "out", "--rank", 5, "--overwrite")


def test_a_sharded_copy_of_the_base_is_the_same_base(
    checkpoint: Build, trained: Path, base: Path, tmp_path: Path
) -> None:
    sharded = checkpoint("llama", shard=SHARDED)
    succeeded("merge", trained, "-o", tmp_path / "out", "--base", sharded)
