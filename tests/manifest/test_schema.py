"""svdconvert.json: what is written is read back, and invalid content is refused."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svdconvert.checkpoint.safetensors_files import SafetensorsSource
from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.manifest.fingerprint import Fingerprint, checksum
from svdconvert.manifest.place import Place, Rows
from svdconvert.manifest.results import (
    KeptUpdate,
    LoraResult,
    MergeResult,
    RecoveredFactors,
    Result,
    TrainResult,
    TruncatedLora,
    TruncatedModule,
    Update,
)
from svdconvert.manifest.schema import Manifest, Matrix, Origin, has_manifest, read_manifest

MATRIX = Matrix(module="m", role="attn.q", shape=(4, 3), dtype="BF16", rank=2, scale=0.5, error=1e-3)
ORIGIN = Origin(location="org/name", revision="abc", fingerprint=Fingerprint("c", "h", {"w": "1"}))
MANIFEST = Manifest(
    kind="decomposed",
    layout="llama",
    method="pissa",
    base=ORIGIN,
    options={"rank": 2, "targets": ["attn"]},
    matrices={"w": MATRIX},
    files={"model.safetensors": {"w": "2"}, "pissa_init/adapter_model.safetensors": {"w.lora_A": "3"}},
    roles={"model.safetensors": "model", "pissa_init/adapter_model.safetensors": "initial_adapter"},
    threads=1,
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert not has_manifest(tmp_path)
    MANIFEST.write(tmp_path)
    assert has_manifest(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST
    assert (tmp_path / "svdconvert.json").read_text().endswith("}\n")


def test_the_place_of_an_expert_is_read_back(tmp_path: Path) -> None:
    place = Place(
        parameter="m.experts.gate_up_proj",
        expert=3,
        rows=Rows(0, 2, 2),
        transposed=True,
        projections=("gate_proj", "up_proj"),
        interleaved=True,
    )
    manifest = replace(MANIFEST, matrices={"w[3]": replace(MATRIX, place=place)})
    manifest.write(tmp_path)
    found = read_manifest(tmp_path).matrices["w[3]"].place
    assert found is not None and found.rows is not None
    assert found.rows.slice == slice(0, 4, 2)
    assert replace(found, projections=tuple(found.projections)) == place


@pytest.mark.parametrize(
    "change", [{"expert": -1}, {"expert": 1 << 40}, {"rows": [0, 4, 0]}, {"rows": [-3, 4, 1]}]
)
def test_a_place_that_no_model_has_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / "svdconvert.json"
    values = json.loads(path.read_text())
    values["matrices"]["w"]["place"] = {"parameter": "m.w", **change}
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="is damaged at matrices.w.place"):
        read_manifest(tmp_path)


def test_a_manifest_without_base_or_matrices_is_read(tmp_path: Path) -> None:
    bare = Manifest(kind="merged", layout="llama", method="lora", base=None, result=MergeResult())
    assert read_manifest((bare.write(tmp_path), tmp_path)[1]) == bare


def test_the_checksums_of_the_model_do_not_include_the_adapter() -> None:
    assert MANIFEST.checksums == {"w": "2"}


KEPT = KeptUpdate(size=2.0, cosine=0.5, kept=0.25)
RESULTS: list[tuple[str, Result]] = [
    ("trained", TrainResult(head={"architectures": ["X"]})),
    ("merged", MergeResult(side="residual", update=Update(cosine=0.5, kept=0.25, matrices={"w": KEPT}))),
    ("merged", MergeResult(recovered=RecoveredFactors(by="pissa"))),
    (
        "lora",
        LoraResult(
            rank=4, truncation=TruncatedLora(error=0.1, modules={"m": TruncatedModule(rank=4, error=0.1)})
        ),
    ),
    (
        "lora",
        LoraResult(
            rank=8, recovered=RecoveredFactors(by="difference", error=0.1, of_base=0.01, modules={"m": 0.1})
        ),
    ),
]


@pytest.mark.parametrize(("kind", "result"), RESULTS)
def test_the_result_of_every_kind_is_read_as_its_class(tmp_path: Path, kind: Any, result: Result) -> None:
    manifest = Manifest(kind=kind, layout="llama", method="pissa", base=None, result=result)
    assert read_manifest((manifest.write(tmp_path), tmp_path)[1]) == manifest


def test_the_keys_that_other_programs_read_stand_at_the_top(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    written = json.loads((tmp_path / "svdconvert.json").read_text())
    assert {"format", "kind", "files", "matrices", "residual", "options"} <= written.keys()
    assert written["format"] == 2


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / "svdconvert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert read_manifest(tmp_path) == MANIFEST


def test_a_file_without_a_role_has_the_one_that_its_kind_and_place_imply(tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": {"a": "1"}, "pissa_init/adapter_model.safetensors": {"a": "2"}}
    trained = Manifest(kind="trained", layout="", method="pissa", base=None, files=files)
    assert trained.files_of("adapter") == ["adapter_model.safetensors"]
    assert trained.files_of("initial_adapter") == ["pissa_init/adapter_model.safetensors"]
    assert trained.files_of("model") == [] and trained.checksums == {}
    assert trained.init_directory == "pissa_init"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_manifest_that_json_cannot_hold_is_not_written(tmp_path: Path, value: float) -> None:
    matrix = Matrix(module="m", role="attn.q", shape=(4, 3), dtype="BF16", rank=2, scale=1.0, error=value)
    broken = Manifest(kind="decomposed", layout="", method="pissa", base=None, matrices={"w": matrix})
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        broken.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 3}, "has format 3, and this svdconvert reads formats 1 to 2"),
        ({"format": None}, "has format None"),
        ({"base": {"location": "x"}}, "is damaged"),
        ({"matrices": {"w": {"module": "m"}}}, "is damaged"),
        ({"matrices": {"w": {}}}, "is damaged"),
        ({"matrices": []}, "is damaged"),
        ({"matrices": {"w": 3}}, "is damaged"),
        ({"base": 3}, "is damaged"),
    ],
)
def test_a_manifest_with_invalid_values_is_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / "svdconvert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=complaint):
        read_manifest(tmp_path)


@pytest.mark.parametrize("key", ["base", "layout", "method", "kind"])
def test_a_manifest_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    MANIFEST.write(tmp_path)
    path = tmp_path / "svdconvert.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key})
    )
    with pytest.raises(ArtifactError, match=f"is damaged at {key}"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "svdconvert.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_manifest(tmp_path)


def test_a_directory_without_a_manifest_is_refused_and_an_unfinished_one_is_named_as_such(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArtifactError, match="was not written by svdconvert: it holds no svdconvert.json"):
        read_manifest(tmp_path)
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ArtifactError, match="unfinished run"):
        read_manifest(tmp_path / "out.partial")


def test_decompose_records_the_checksum_of_every_tensor_that_it_wrote_and_read(
    checkpoint: Callable[..., Path], decomposed: Callable[..., Path]
) -> None:
    base = checkpoint("llama")
    out = decomposed(base)
    manifest = read_manifest(out)
    assert manifest.files == {
        file: {name: checksum(tensor_bytes(source.read(name))) for name in source.infos}
        for file in ("model.safetensors", "pissa_init/adapter_model.safetensors")
        for source in [SafetensorsSource([out / file])]
    }
    source = SafetensorsSource([base / "model.safetensors"])
    assert manifest.base is not None
    assert manifest.base.location == str(base)
    assert manifest.base.fingerprint.tensors == {
        name: checksum(tensor_bytes(source.read(name))) for name in source.infos
    }
    assert str(out) not in (out / "svdconvert.json").read_text()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *itertools.product(
            ["files", "roles", "sidecars"],
            [".env", "../x.json", "/etc/x.json", "a/../../x.json", "a\\x.json", "a/.b/x.json", ""],
        ),
        ("files", "id_rsa"),  # of sidecars only the checksum is compared
        ("roles", "id_rsa"),
    ],
)
def test_a_manifest_that_names_a_foreign_or_private_file_is_refused_by_that_name(
    tmp_path: Path, key: str, name: str
) -> None:
    MANIFEST.write(tmp_path)
    content = json.loads((tmp_path / "svdconvert.json").read_text())
    content[key][name] = {} if key == "files" else "model"
    (tmp_path / "svdconvert.json").write_text(json.dumps(content))
    with pytest.raises(
        ArtifactError, match="svdconvert.json names .*, which .*; restore the manifest"
    ) as told:
        read_manifest(tmp_path)
    assert repr(name) in str(told.value)


@pytest.mark.parametrize("method", ["../../x", "/tmp/x", "a/b", ".hidden", ".."])
def test_a_manifest_whose_method_is_a_path_is_refused(tmp_path: Path, method: str) -> None:
    MANIFEST.write(tmp_path)
    content = json.loads((tmp_path / "svdconvert.json").read_text())
    (tmp_path / "svdconvert.json").write_text(json.dumps(content | {"method": method}))
    with pytest.raises(ArtifactError, match="damaged at method"):
        read_manifest(tmp_path)


def test_a_manifest_whose_file_is_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    directory = tmp_path / "directory"
    directory.mkdir()
    MANIFEST.write(directory)
    (directory / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="model.safetensors.* a symbolic link that ends outside"):
        read_manifest(directory)
