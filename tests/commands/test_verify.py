"""What has changed since it was written is found, and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdconvert import SplitOptions, decompose, merge, verify
from tests.conftest import Build
from tests.program import refused, succeeded, svdconvert
from tests.stock import start_of, tensors
from tests.ways import chosen, every_way

TENSOR = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def pissa(checkpoint: Build, decomposed: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decomposed(checkpoint("llama")), tmp_path / "pissa"))


def flip(file: Path, name: str) -> None:
    """Change the last bit of one value in the middle of a tensor, and nothing else of the file."""
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + header])[name]["data_offsets"]
    raw[8 + header + (begin + end) // 8 * 4] ^= 1
    file.write_bytes(raw)


@every_way
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_was_just_written_is_as_it_says(
    way: str, family: str, checkpoint: Build, decomposed: Build
) -> None:
    report = verify(decomposed(checkpoint(family), **chosen(way)))
    assert (report.faults, report.passed, report.matrices) == ([], True, 14)
    assert report.base == str(checkpoint(family))


def test_a_flipped_bit_of_a_shard_is_found(pissa: Path) -> None:
    flip(pissa / "model.safetensors", TENSOR)
    ended = svdconvert("verify", pissa)
    assert ended.status == 1
    lines = ended.err.splitlines()
    assert lines[0] == f"svdconvert: {pissa / 'model.safetensors'}: {TENSOR} has changed since it was written"
    assert all(TENSOR in line for line in lines)
    assert f"has {len(lines)} faults" in ended.out


def test_a_flipped_bit_of_what_is_no_target_is_found(pissa: Path) -> None:
    flip(pissa / "model.safetensors", "model.norm.weight")
    report = verify(pissa)
    assert [fault.split(": ")[1] for fault in report.faults] == [
        "model.norm.weight has changed since it was written"
    ]


def test_a_changed_factor_is_found_by_sum_and_by_error(pissa: Path) -> None:
    file = start_of(pissa) / WEIGHTS
    pieces = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    pieces[name] *= 1.5
    save_file(pieces, file, metadata={"format": "pt"})
    faults = verify(pissa).faults
    assert faults[0] == f"{file}: {name} has changed since it was written"
    assert [fault.split(": ", 1)[0] for fault in faults[1:]] == [TENSOR] * (len(faults) - 1)
    assert any("reconstruction error" in fault for fault in faults)
    assert any("first singular value" in fault for fault in faults)


def test_a_wrong_claim_of_the_manifest_is_found(pissa: Path) -> None:
    manifest = json.loads((pissa / "svdconvert.json").read_text())
    manifest["matrices"][TENSOR] |= {"error": 0.5, "energy": 0.01}
    (pissa / "svdconvert.json").write_text(json.dumps(manifest))
    faults = verify(pissa).faults
    assert len(faults) == 2
    assert all(fault.startswith(TENSOR) for fault in faults)
    assert "instead of 0.5" in faults[0]
    assert "captured energy" in faults[1]


@pytest.mark.parametrize("name", [TENSOR, "model.norm.weight"])
def test_a_missing_tensor_is_found(name: str, pissa: Path) -> None:
    kept = {other: tensor for other, tensor in tensors(pissa).items() if other != name}
    save_file(kept, pissa / "model.safetensors", metadata={"format": "pt"})
    ended = svdconvert("verify", pissa)
    assert ended.status == 1
    assert f"{name} is missing" in ended.err


def test_a_missing_file_is_found(pissa: Path) -> None:
    (start_of(pissa) / WEIGHTS).unlink()
    refused("verify", pissa, words=[start_of(pissa) / WEIGHTS])


def test_without_the_base_it_compares_the_sums_and_says_so(checkpoint: Build, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    decompose(model, tmp_path / "out", SplitOptions(rank=4))
    model.rename(tmp_path / "moved")
    report = verify(tmp_path / "out")
    assert (report.passed, report.matrices, report.base, report.exact) == (True, 0, None, None)
    shown = succeeded("verify", tmp_path / "out").out
    assert "not found" in shown
    assert "--base" in shown
    assert verify(tmp_path / "out", base=str(tmp_path / "moved")).matrices == 14


def test_another_base_is_refused(pissa: Path, checkpoint: Build) -> None:
    refused("verify", pissa, "--base", checkpoint("qwen2"), words=[checkpoint("qwen2"), "is not the model"])


@pytest.mark.parametrize("residual", ["auto", "float32"])
def test_the_share_that_comes_back_exactly_is_the_share_that_merge_gives(
    residual: str, checkpoint: Build, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    decompose(model, tmp_path / "out", SplitOptions(rank=4, residual_dtype=residual))
    report = verify(tmp_path / "out")
    succeeded("merge", tmp_path / "out", "-o", tmp_path / "merged", "--from", "residual")
    before, after = tensors(model), tensors(tmp_path / "merged")
    names = [name for name in before if "_proj" in name]
    same = sum(int((before[name] == after[name]).sum()) for name in names)
    assert report.exact == same / sum(before[name].numel() for name in names)
    assert (report.exact == 1.0) == (residual == "float32")
    assert f"{report.exact:.4f} of the entries" in succeeded("verify", tmp_path / "out").out


def test_merged_and_converted_directories_are_verified_too(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama"))
    merge(out, tmp_path / "merged")
    succeeded("to-lora", out, "-o", tmp_path / "lora")
    assert verify(tmp_path / "merged").tensors == len(tensors(tmp_path / "merged"))
    assert verify(tmp_path / "lora").tensors == 28
    flip(tmp_path / "merged" / "model.safetensors", TENSOR)
    flip(tmp_path / "lora" / WEIGHTS, "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")
    assert len(verify(tmp_path / "merged").faults) == len(verify(tmp_path / "lora").faults) == 1


def test_a_directory_of_another_program_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "x.bin")
    refused("verify", tmp_path, words=[tmp_path, "holds no svdconvert.json"])


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    refused("verify", tmp_path / "notes.txt", words=["notes.txt is a file; give a directory"])
    refused("verify", tmp_path / "nothing.txt", words=["nothing.txt does not exist"])


def test_a_base_that_is_only_compared_is_named(tmp_path: Path, checkpoint: Build, decomposed: Build) -> None:
    base = checkpoint("llama")
    succeeded("merge", decomposed(base), "-o", tmp_path / "merged")
    assert "quick comparison" not in succeeded("verify", tmp_path / "merged").out
    said = succeeded("verify", tmp_path / "merged", "--base", base).out
    assert f"{base}, the right one by a quick comparison" in " ".join(said.split())


def test_nuclear_norms_are_not_for_an_audit(tmp_path: Path) -> None:
    words = ["--merged", tmp_path, "--base", tmp_path, "--adapter", tmp_path, "--nuclear-ratio", "all"]
    ended = svdconvert("verify", *words)
    assert ended.status == 2 and "--nuclear-ratio is about a DIR" in ended.err
