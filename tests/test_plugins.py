"""Plug-ins of other packages: found by entry points, and no danger to each other or to svdconvert."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from svdconvert.errors import PluginError, UnknownNameError
from svdconvert.layouts.base import LAYOUTS
from svdconvert.layouts.detect import find_layout, has_signature_tensor
from svdconvert.methods.base import METHODS
from svdconvert.plugins import Registry
from tests.conftest import Build
from tests.program import refused, succeeded


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package "gallery" with a good layout, a layout that fails, and two wrong objects."""
    site = tmp_path / "site"
    info = site / "gallery-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gallery\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[svdconvert.layouts]\n"
        "good = gallery_good:LAYOUT\n"
        "broken = gallery_broken:LAYOUT\n"
        "module = gallery_good\n"
        "llama = gallery_broken:LAYOUT\n"
        "[svdconvert.methods]\n"
        "wrong = gallery_good:LAYOUT\n"
    )
    (site / "gallery_good.py").write_text(
        "from svdconvert.layouts.base import Layout\n"
        "LAYOUT = Layout(model_types=frozenset({'gallery'}), roles={'mlp.up': 'h.{layer}.up.weight'})\n"
    )
    (site / "gallery_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(site))
    for registry in (LAYOUTS, METHODS):
        for cached in ("_files", "_entry_points"):
            monkeypatch.delitem(registry.__dict__, cached, raising=False)
    yield
    for registry in (LAYOUTS, METHODS):
        registry.__dict__.pop("_entry_points", None)


@pytest.mark.usefixtures("package")
def test_a_broken_plug_in_does_not_keep_others_from_being_found() -> None:
    assert {"good", "broken", "module", "llama"} <= {*LAYOUTS.names()}
    assert find_layout(None, "gallery", "dir")[0] == "good"
    name, layout = find_layout(None, "llama", "dir")
    assert name == "llama" and "mistral" in layout.model_types, "svdconvert's own layout wins"
    assert not has_signature_tensor({"h.0.up.weight"})
    loaded, failed = LAYOUTS.load_all()
    assert "good" in loaded and not {"broken", "module"} & loaded.keys()
    assert len(failed) == 2


@pytest.mark.usefixtures("package")
def test_a_broken_plug_in_is_named_when_it_is_asked_for_or_may_have_been_needed() -> None:
    with pytest.raises(PluginError, match=r"layout broken of gallery cannot be loaded .*no_such_library"):
        find_layout("broken", None, "dir")
    with pytest.raises(UnknownNameError, match=r"'gallery9'.*mean gallery\?.*layout broken of gallery"):
        find_layout(None, "gallery9", "dir")
    with pytest.raises(PluginError, match=r"gallery_good, a module and no Layout; .*my_module:LAYOUT"):
        LAYOUTS.get("module")
    with pytest.raises(PluginError, match=r"method wrong of gallery is .*, a Layout and no Method"):
        METHODS.get("wrong")


@pytest.mark.usefixtures("package")
def test_commands_work_next_to_a_broken_plug_in(checkpoint: Build, tmp_path: Path) -> None:
    model = checkpoint("llama")
    succeeded("decompose", model, "-o", tmp_path / "out", "--rank", 4)
    refused("decompose", model, "-o", tmp_path / "no", "--layout", "broken", words=["broken of gallery"])
    refused("decompose", model, "-o", tmp_path / "no", "--method", "wrong", words=["wrong of gallery"])
    rows = {row["layout"]: row for row in json.loads(succeeded("list", "layouts", "--json").out)}
    assert "no_such_library" in rows["broken"]["models"]
    assert rows["good"]["model_types"] == ["gallery"]
    methods = {row["method"]: row for row in json.loads(succeeded("list", "methods", "--json").out)}
    assert "no Method" in methods["wrong"]["does"]
    assert methods["wrong"].keys() == methods["pissa"].keys()


@pytest.mark.parametrize("registry", [LAYOUTS, METHODS], ids=["layouts", "methods"])
def test_every_file_of_a_plug_in_package_is_a_plug_in_or_shared(registry: Registry[object]) -> None:
    for name in registry.names():
        assert isinstance(registry.get(name), registry._kind)
