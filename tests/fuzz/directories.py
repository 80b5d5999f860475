"""Targets that describe a directory: manifests, adapters, journals, configurations, and whole commands."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
import xxhash
from peft import LoraConfig
from safetensors.torch import save

from svdconvert import MergeOptions, Run, inspect, merge, to_lora
from svdconvert.adapters.adapter_config import read_adapter_config
from svdconvert.adapters.peft_files import open_adapter
from svdconvert.cli.summaries import show_inspection
from svdconvert.errors import SvdConvertError
from svdconvert.inputs.model import open_model
from svdconvert.inputs.storage_format import quantization_method, refuse_codes
from svdconvert.manifest.schema import read_manifest
from svdconvert.output.journal import Journal, is_own_journal, read_journal
from svdconvert.output.ownership import foreign_files
from svdconvert.output.sidecars import copy_sidecars, read_config, set_config_dtype, untie_different
from svdconvert.output.tokenizer_files import copy_tokenizer
from svdconvert.publish.upload import _code_files
from tests.data.make_format1 import FORMAT1
from tests.fuzz.checkpoints import _change_safetensors
from tests.fuzz.mutate import change_json, change_lines
from tests.fuzz.target import Target, content_of, put

RUN = Run(device="cpu", threads=1)
MODULE = "model.layers.0.self_attn.q_proj"


def _read_adapter_config(raw: bytes, directory: Path) -> None:
    """As PEFT reads it, for what PEFT knows."""
    (directory / "adapter_config.json").write_bytes(raw)
    config = read_adapter_config(directory)
    scale = config.scale(MODULE)
    json.loads(config.text())
    if config.peft_type != "LORA":
        return
    known = LoraConfig(r=config.rank, lora_alpha=config.alpha, use_rslora=config.rslora)
    stored = json.loads(raw)
    assert known.r == stored["r"] and known.lora_alpha == stored["lora_alpha"]
    if not config.rank_pattern and not config.alpha_pattern:
        divisor = config.rank**0.5 if config.rslora else config.rank
        assert scale == config.alpha / divisor


def _read_adapter(raw: bytes, directory: Path) -> None:
    """The tensors of an adapter in PEFT's format, with a configuration that declares a norm."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "all", "modules_to_save": ["norm"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(raw)
    adapter = open_adapter(directory)
    for module in adapter.modules:
        change_OI = adapter.factors(module)
        assert change_OI.left_OR.shape[1] == change_OI.right_RI.shape[0]
    for name in adapter.extras:
        assert adapter.parameter(name).isfinite().all()


def _read_manifest(raw: bytes, directory: Path) -> None:
    """Read, written and read again it is the same manifest."""
    (directory / "svdconvert.json").write_bytes(raw)
    (directory / "model.safetensors").write_bytes(b"")
    list(foreign_files(directory))
    manifest = read_manifest(directory)
    assert isinstance(manifest.checksums, dict) and isinstance(manifest.init_directory, str)
    names = (*manifest.files, *manifest.roles, *manifest.sidecars)
    assert not any(".." in name.split("/") or name.startswith("/") for name in names)
    manifest.write(directory)
    assert asdict(read_manifest(directory)) == asdict(manifest)


IDENTITY = {"verb": "decompose", "options": {"rank": 4}, "source": {"files": {"a": [1, 2]}}}


def _read_journal(raw: bytes, directory: Path) -> None:
    """Opened once or twice it tells the same items, and nothing of another command's."""
    path = directory / "journal.jsonl"
    path.write_bytes(raw)
    is_own_journal(path)
    read_journal(path)
    journal = Journal(path, IDENTITY)
    journal.close()
    again = Journal(path, IDENTITY)
    again.close()
    assert (again.finished, again.unsynced) == (journal.finished, journal.unsynced)
    assert read_journal(path)[1] == journal.finished


def _change_journal(chance: Random, raw: bytes) -> bytes:
    """Changed lines, most of them with checksums that are right again."""
    changed = change_lines(chance, raw)
    return (
        changed if chance.random() < 0.2 else b"".join(map(_checked_again, changed.splitlines(keepends=True)))
    )


def _checked_again(text: bytes) -> bytes:
    try:
        line = json.loads(text)["line"]
        checksum = xxhash.xxh3_64_hexdigest(json.dumps(line).encode())
        return json.dumps({"checksum": checksum, "line": line}).encode() + b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _read_config(raw: bytes, directory: Path) -> None:
    """config.json of a model, as it is read, compared and written again."""
    shutil.copyfile(FORMAT1 / "base" / "model.safetensors", directory / "model.safetensors")
    (directory / "config.json").write_bytes(raw)
    model = open_model(str(directory))
    assert repr(model.config) == repr(json.loads(raw))
    json.dumps(model.identity())
    quantization_method(model.config)
    refuse_codes(directory, model.config, model.source.infos, model.source.infos)
    _code_files(model.config)
    set_config_dtype(directory, ["F32"])
    untie_different(directory, {"f": {"lm_head.weight": "1", "model.embed_tokens.weight": "2"}})
    read_config(directory)
    model.layout()


def _read_sidecar(raw: bytes, directory: Path) -> None:
    """A file next to the weights that decides what is copied."""
    source, target = directory / "source", directory / "target"
    shutil.copytree(FORMAT1 / "base", source)
    target.mkdir()
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (target / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    put(raw, source)
    copy_sidecars(source, target)
    put(raw, source)
    (target / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    copy_tokenizer(source, target)
    assert not [path for path in target.rglob("*") if path.is_symlink()]


def _directory_with(raw: bytes, directory: Path) -> Path:
    """A copy of a directory of format 1 with the file that the input begins with; the base is next to it."""
    kind = raw.partition(b"/")[0].decode()
    shutil.copytree(FORMAT1 / "base", directory / "base")
    if kind != "base":
        shutil.copytree(FORMAT1 / kind, directory / kind)
    put(raw, directory)
    return directory / kind


def _read_directory(raw: bytes, directory: Path) -> None:
    """`inspect`, with what it prints, also for an engine that serves adapters."""
    given = _directory_with(raw, directory)
    found = inspect(given)
    show_inspection(found)
    if found.kind in ("trained", "lora", "adapter"):
        show_inspection(inspect(given, "vllm"))


def _merge_directory(raw: bytes, directory: Path) -> None:
    """`merge` and `to-lora`; nothing stands under the name of an output that was refused."""
    given = _directory_with(raw, directory)
    base = str(directory / "base")
    for command, options in ((merge, MergeOptions(max_shard_size="5GB")), (to_lora, None)):
        out = directory / command.__name__
        try:
            command(given, out, options, RUN, base=base)  # type: ignore[operator]
        except SvdConvertError:
            assert not out.exists()
            raise
        assert read_manifest(out).kind in ("merged", "lora")


def _named(*names: str) -> list[bytes]:
    return [name.encode() + b"\n" + (FORMAT1 / name).read_bytes() for name in names]


def _journal() -> bytes:
    lines: list[Any] = [
        IDENTITY,
        {"item": "a", "record": {"source": "1", "files": {"model.safetensors": {"a": "0"}}}},
        {"synced": "model.safetensors", "before": 2},
        {"item": "b", "record": {"source": "2", "note": {"rank": 4}}},
    ]
    return b"".join(_checked_again(json.dumps({"line": line}).encode()) for line in lines)


_PREFIX = f"base_model.model.{MODULE}"
_ADAPTER = save(
    {
        f"{_PREFIX}.lora_A.weight": torch.ones(2, 4),
        f"{_PREFIX}.lora_B.weight": torch.ones(3, 2),
        "base_model.model.model.norm.weight": torch.ones(4),
    }
)
_MANIFESTS = ("decomposed", "trained", "classifier", "merged", "full", "lora", "lora-truncated", "converted")
_CONFIGS = [(FORMAT1 / place / "adapter_config.json").read_bytes() for place in ("trained", "lora")]

TARGETS = {
    "adapter-config": Target(_read_adapter_config, share=25, seeds=_CONFIGS),
    "adapter-tensors": Target(_read_adapter, _change_safetensors, share=15, seeds=[_ADAPTER]),
    "manifest": Target(
        _read_manifest,
        share=25,
        seeds=[(FORMAT1 / kind / "svdconvert.json").read_bytes() for kind in _MANIFESTS],
    ),
    "journal": Target(_read_journal, _change_journal, share=20, seeds=[_journal()]),
    "config": Target(_read_config, share=15, seeds=[(FORMAT1 / "base" / "config.json").read_bytes()]),
    "sidecars": Target(
        _read_sidecar,
        content_of(change_json),
        share=5,
        seeds=[
            *(raw.removeprefix(b"base/") for raw in _named("base/tokenizer_config.json")),
            b'modules.json\n[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling", "type": "P"}]',
        ],
    ),
    "inspect": Target(
        _read_directory,
        content_of(change_json),
        share=5,
        seeds=_named(
            *(f"{kind}/svdconvert.json" for kind in _MANIFESTS),
            "trained/adapter_config.json",
            "base/config.json",
        ),
    ),
    "merge": Target(
        _merge_directory,
        content_of(change_json),
        share=1,
        seeds=_named(
            "trained/svdconvert.json",
            "decomposed/svdconvert.json",
            "lora/svdconvert.json",
            "trained/adapter_config.json",
            "trained/pissa_init/adapter_config.json",
            "lora/adapter_config.json",
            "base/config.json",
        ),
    ),
}
