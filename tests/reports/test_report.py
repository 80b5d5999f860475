"""A report is one valid page for every kind of directory, and its numbers are those of the files."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from svdconvert import (
    LoraOptions,
    Run,
    SplitOptions,
    TrainOptions,
    convert,
    decompose,
    merge,
    report,
    to_lora,
    train,
)
from svdconvert.config.options import ConvertOptions
from svdconvert.errors import MissingPackageError
from svdconvert.manifest.schema import read_manifest
from svdconvert.reports.spectra import measure_spectra
from tests.conftest import Build
from tests.evaluated import write_result
from tests.program import refused, succeeded
from tests.reading import readable, write_sums
from tests.reports.pages import read_page
from tests.rwkv6 import random_model, save

RUN = Run(device="cpu")


@pytest.fixture(scope="module")
def made(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of every kind. Tests must not write to them."""
    home = tmp_path_factory.mktemp("made")
    base = readable(checkpoint("llama", dtype=torch.float32), home / "base")
    decompose(base, home / "pissa", SplitOptions(rank=4), RUN)
    plan = TrainOptions(
        data=str(write_sums(home / "sums.jsonl")),
        steps=4,
        max_length=48,
        lr=0.01,
        eval_rows=2,
        eval_every=2,
        samples=1,
        sample_tokens=3,
    )
    train(home / "pissa", home / "trained", plan, RUN)
    train(base, home / "full", plan, RUN, split=SplitOptions(method="full"))
    to_lora(home / "trained", home / "lora", LoraOptions(rank=3))
    merge(home / "trained", home / "merged", run=RUN)
    peft = home / "peft"
    peft.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(home / "lora" / name, peft / name)
    rwkv = save(random_model(), home / "small.pth")
    convert(rwkv, home / "rwkv", ConvertOptions(layout="hf"))
    decompose(rwkv, home / "rwkv-pissa", SplitOptions(rank=2), RUN)
    write_result(home / "trained", [True, True, False, True])
    return home


KINDS = ("pissa", "trained", "full", "lora", "merged", "peft", "rwkv", "rwkv-pissa", "base")


@pytest.fixture(scope="module")
def text(made: Path) -> str:
    """A report on all of them."""
    out = report([made / name for name in KINDS], made / "page.html")
    return out.read_text(encoding="utf-8")


def test_a_page_on_every_kind_of_directory_is_valid_and_loads_nothing(text: str, made: Path) -> None:
    page = read_page(text)
    assert all(name in page.text for name in KINDS)
    assert page.elements["svg"] > 10
    assert str(made) not in text


def test_the_same_directories_give_the_same_bytes(text: str, made: Path, tmp_path: Path) -> None:
    again = report([made / name for name in KINDS], tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == text


def test_every_heat_map_has_the_values_of_the_manifest(text: str, made: Path) -> None:
    cells = dict(re.findall(r"<title>([\w.]+, layer \d+): ([^<]+)</title>", text))
    assert len(cells) >= 14
    page = report(made / "pissa", made / "one.html").read_text(encoding="utf-8")
    shown = re.findall(r"<title>([\w.]+), layer (\d+): ([^<]+)</title>", page)
    matrices = read_manifest(made / "pissa").matrices
    for role, layer, value in shown[:14]:
        (matrix,) = (one for name, one in matrices.items() if one.role == role and f".{layer}." in name)
        assert float(value) == pytest.approx(matrix.energy, rel=1e-3)


def test_the_spectra_are_those_of_the_full_matrices(made: Path) -> None:
    found = measure_spectra(made / "trained")
    trained = load_file(made / "trained" / "adapter_model.safetensors")
    start = load_file(made / "trained" / "pissa_init" / "adapter_model.safetensors")
    errors = numpy.zeros((14, 9))
    norms = []
    modules = sorted({key.rsplit(".", 2)[0] for key in trained})
    wanted: dict[str, list[numpy.ndarray]] = {"before": [], "change": []}
    for number, module in enumerate(modules):
        now, before = (
            tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()
            for tensors in (trained, start)
        )
        sigma = numpy.linalg.svd((now - before).numpy(), compute_uv=False)[:9]
        norms.append(float((sigma**2).sum()))
        errors[number] = [(sigma[rank:] ** 2).sum() for rank in range(9)]
        wanted["change"].append(sigma)
        wanted["before"].append(numpy.linalg.svd(before.numpy(), compute_uv=False)[:4])
    for name, roles in (("before", found.adapter), ("change", found.change)):
        values = sorted(value for members in roles.values() for sigma in members for value in sigma)
        known = sorted(value for sigma in wanted[name] for value in sigma if value > 1e-6 * sigma[0])
        assert values == pytest.approx(known, rel=1e-4)
    curve = dict(found.truncation)
    for rank in range(8):
        assert curve[rank] == pytest.approx((errors[:, rank].sum() / sum(norms)) ** 0.5, abs=1e-6)


def test_scores_stand_next_to_their_intervals_and_published_numbers(text: str) -> None:
    words = read_page(text).text
    assert "75.0%" in words and "30.1% to 95.4%" in words
    assert "Llama-2-7B, pissa" in words and "53.0%" in words and "published" in words


def test_what_the_files_do_not_have_is_said(text: str) -> None:
    words = read_page(text).text
    assert "there is no svdconvert.json" in words
    assert "it was not evaluated" in words
    assert "it has no factors, and so no singular values" in words
    assert "rate and drift by step are in the directory that train wrote" in words


def test_a_result_of_other_weights_is_left_out_and_named(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "trained", tmp_path / "copy")
    path, _ = write_result(copy, [True, False])
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"model": {"kind": "x", "fingerprint": "0", "name": "y"}})
    )
    page = read_page(report(copy, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "the result of gsm8k is of other weights" in page.text and "50.0%" not in page.text


def test_a_result_that_its_answers_do_not_give_is_left_out_and_named(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "trained", tmp_path / "copy")
    _, answers = write_result(copy, [True, False])
    answers.write_text(answers.read_text().replace("false", "true"))
    page = read_page(report(copy, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "2 correct in gsm8k.jsonl instead of 1" in page.text and "50.0%" not in page.text


HOSTILE = '</title><script>alert(1)</script><img src=x onerror="a()">$\\frac\u202e\x00\x1b[31m'


def test_text_from_files_is_never_markup(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "<script>alert(2)<" / "b>&amp;"
    place.parent.mkdir()
    shutil.copytree(made / "trained", place)
    manifest = json.loads((place / "svdconvert.json").read_text())
    for matrix in manifest["matrices"].values():
        matrix["role"] = HOSTILE + matrix["role"]
    manifest["options"] |= {"data": HOSTILE, "template": HOSTILE}
    manifest["training"]["options"]["data"] = [HOSTILE]
    manifest["training"]["samples"] = [{"prompt": HOSTILE, "before": "</pre>", "after": "<style>*{}</style>"}]
    manifest["svdconvert"] = manifest["layout"] = HOSTILE
    (place / "svdconvert.json").write_text(json.dumps(manifest))
    other = shutil.copytree(made / "trained", tmp_path / "<script>alert(2)<" / "x" / "b>&amp;")
    page = read_page(report([place, other], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.elements["img"] == 0 and page.elements["style"] == 1
    assert "<script>alert(1)</script>" in page.text and "\\x1b[31m" in page.text and "\\u202e" in page.text


def test_directories_of_one_name_are_told_apart(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(made / "lora", tmp_path / name / "lora")
    page = report([tmp_path / "a" / "lora", tmp_path / "b" / "lora"], tmp_path / "page.html")
    words = read_page(page.read_text(encoding="utf-8")).text
    assert "a/lora" in words and "b/lora" in words


def test_only_an_unedited_report_is_replaced(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    succeeded("report", made / "lora", "-o", out)
    refused("report", made / "lora", "-o", out, words=[out, "exists", "--overwrite"])
    written = out.read_text()
    succeeded("report", made / "lora", "-o", out, "--overwrite")
    assert out.read_text() == written
    for foreign in (written.replace("lora", "mine"), "<html></html>", ""):
        out.write_text(foreign)
        refused("report", made / "lora", "-o", out, "--overwrite", words=[out, "not overwritten"])
        assert out.read_text() == foreign
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_a_place_that_cannot_hold_a_page_is_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    refused("report", made / "lora", "-o", tmp_path / "page.pdf", words=["does not end in .html"])
    refused("report", made / "lora", "-o", tmp_path / "none" / "page.html", words=["does not exist"])
    refused("report", tmp_path / "none", "-o", tmp_path / "page.html", words=["none"])
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r'pip install "svdconvert\[plot\]"'):
        report(made / "lora", tmp_path / "page.html")


def test_a_damaged_file_of_measurements_is_said_and_the_rest_is_shown(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "trained", tmp_path / "copy")
    (copy / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    page = read_page(report(copy, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "is no measurement" in page.text and "Singular values of the change by training" in page.text


@pytest.mark.parametrize("kind", ["pissa", "trained", "lora", "rwkv-pissa"])
def test_changed_factors_are_refused(kind: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / kind, tmp_path / "given")
    for file in sorted((tmp_path / "given").rglob("adapter_model.safetensors")):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        refused("report", tmp_path / "given", "-o", tmp_path / "page.html", words=[file, "is not the tensor"])
        data[-1] ^= 1
        file.write_bytes(data)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("kind", "is_said"), [("merged", True), ("pissa", True), ("lora", False)])
def test_a_page_says_that_the_weights_of_a_model_were_not_compared(
    kind: str, is_said: bool, made: Path, tmp_path: Path
) -> None:
    text = report(made / kind, tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("svdconvert verify compares them" in read_page(text).text) is is_said


def test_edited_measurements_are_left_out_and_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "trained", tmp_path / "given")
    curve = "Learning rate"
    before = read_page(report(tmp_path / "given", tmp_path / "a.html").read_text(encoding="utf-8")).text
    with (tmp_path / "given" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "loss": 0.001, "lr": 0.1}\n')
    after = read_page(report(tmp_path / "given", tmp_path / "b.html").read_text(encoding="utf-8")).text
    assert curve in before and curve not in after
    assert "metrics.jsonl is not the file that" in after
