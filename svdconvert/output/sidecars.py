"""The files that belong to a checkpoint besides its weights: configuration, tokenizer, templates, licence."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.file_names import refuse_links_outside
from svdconvert.checkpoint.json_text import read_json
from svdconvert.checkpoint.safetensors_files import INDEX
from svdconvert.checkpoint.tensors import ELEMENTS
from svdconvert.errors import CheckpointError
from svdconvert.output.file_kinds import file_kind, sidecar_folders
from svdconvert.output.plan import PlannedFile, index_text

CONFIG = "config.json"
QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Entries of config.json that say how weights are quantised."""
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which ModelOpt, GPTQ and AWQ say the same."""
_TIED = "tie_word_embeddings"
# What transformers ties: the matrix that ends in a row for each word, and the one that begins with them.
_HEADS = ("lm_head.weight", "lm_head.decoder.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight", "shared.weight",
)  # fmt: skip


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises CheckpointError if it is missing or not a JSON object."""
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a checkpoint is a directory with weights and {CONFIG}")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if it holds anything else."""
    try:
        value = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; restore the file")
    return value


def has_config(model: Path) -> bool:
    """True if a model has a config.json: in its directory or, for a .safetensors or .bin, next to it."""
    if model.is_dir():
        return (model / CONFIG).is_file()
    return model.suffix in (".safetensors", ".bin") and (model.parent / CONFIG).is_file()


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_bytes(text.encode("utf-8", "backslashreplace"))


def complete_checkpoint(
    source: Path,
    target: Path,
    shards: Sequence[PlannedFile],
    *,
    exclude: Sequence[str] = (),
    dtypes: Iterable[str] | None = None,
    was_decoded: bool = False,
) -> None:
    """Add to the `shards` in `target` what makes them a checkpoint: sidecars, index and config.json's dtype.

    Sidecars whose names match a pattern in `exclude` are not copied. `dtypes` are the element types of the
    weights, if those of the stored tensors are not. If the shards hold the decoded weights
    of a quantised model (`was_decoded`), what describes its quantisation is left out.
    """
    copy_sidecars(source, target, exclude=[*exclude, *(QUANTISATION_FILES if was_decoded else ())])
    if was_decoded:
        _remove_quantisation(target)
    if dtypes is None:
        dtypes = (info.dtype for shard in shards for info in shard.infos)
    set_config_dtype(target, dtypes)
    if len(shards) > 1:
        (target / INDEX).write_text(index_text(shards), encoding="utf-8")


def _remove_quantisation(directory: Path) -> None:
    """Remove the entries of config.json, and of the configurations inside it, that describe codes."""
    path = directory / CONFIG
    if not path.exists():
        return
    config = read_json_object(path)
    for part in (config, *_inner_configs(config)):
        for key in QUANTISATION_KEYS:
            part.pop(key, None)
    write_config(directory, config)


def copy_sidecars(source: Path, target: Path, *, exclude: Sequence[str] = ()) -> None:
    """Copy the files that a loader may need in addition to the weights.

    Of a single file without a configuration, only an RWKV vocabulary in the same directory is copied. Raises
    CheckpointError for a symbolic link that ends outside the model's directory.
    """
    directory = source if source.is_dir() else source.parent
    paths = [
        path
        for path in _sidecars(source)
        if not any(fnmatchcase(path.relative_to(directory).parts[0], pattern) for pattern in exclude)
    ]
    refuse_links_outside(paths, directory)
    for path in paths:
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def refuse_foreign_sidecars(source: Path) -> None:
    """Raise CheckpointError if a file that `copy_sidecars` would copy is a link out of the directory."""
    refuse_links_outside(_sidecars(source), source if source.is_dir() else source.parent)


def _sidecars(source: Path) -> list[Path]:
    """The sidecars of a model, sorted. Links to files are followed, links to folders are not entered."""
    if not source.is_dir():
        if not has_config(source):
            return vocabularies(source.parent)
        source = source.parent
    folders = [folder for folder in sidecar_folders(source) if (source / folder).is_dir()]
    paths = [path for path in source.iterdir() if path.is_file()]
    paths += [path for folder in folders for path in _files_below(source / folder)]
    return sorted({path for path in paths if is_sidecar(path, source)})


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder of sidecars. Raises CheckpointError for a link to a folder."""
    linked = [path for path in (folder, *sorted(folder.rglob("*"))) if path.is_symlink() and path.is_dir()]
    if linked:
        raise CheckpointError(
            f"{linked[0]} is a symbolic link to a folder, which is not followed; replace it by a copy of the "
            "folder, or remove it"
        )
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_sidecar(path: Path, directory: Path) -> bool:
    """True for a file of a model's `directory` that a loader may need in addition to the weights."""
    return file_kind(path.relative_to(directory).as_posix(), sidecar_folders(directory)) == "sidecar"


def vocabularies(directory: Path) -> list[Path]:
    """The RWKV vocabularies in a directory."""
    return sorted(directory.glob("rwkv_vocab*.txt"))


def set_config_dtype(directory: Path, dtypes: Iterable[str]) -> None:
    """Make config.json name a float type that holds every value of `dtypes` (safetensors codes).

    transformers loads in that dtype, so float32 residuals would be rounded if it said "bfloat16". The file is
    not rewritten if it names that type already, or if no tensor is of a float type. A model that is a single
    file has no config.json.
    """
    name = common_float(set(dtypes))
    path = directory / CONFIG
    if name is None or not path.exists():
        return
    config = read_json_object(path)
    if _rename_dtype(config, name):
        write_config(directory, config)


def common_float(stored: set[str]) -> str | None:
    """The narrowest float type that holds all values of the `stored` types; None if none is a float."""
    if {"BF16", "F16"} <= stored:
        stored = stored | {"F32"}
    return next((ELEMENTS[code][1] for code in ("F64", "F32", "BF16", "F16") if code in stored), None)


def _rename_dtype(config: dict[str, Any], name: str) -> bool:
    """Set the dtype in `config` and in the configurations inside it; True if that changed anything."""
    keys = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    if not keys and "model_type" in config:
        keys = ["dtype"]
    changed = _set_named(config, keys, name)
    return any([changed, *(_rename_inner(inner, name) for inner in _inner_configs(config))])


def _rename_inner(config: dict[str, Any], name: str) -> bool:
    changed = _set_named(config, [key for key in ("dtype", "torch_dtype") if config.get(key)], name)
    return any([changed, *(_rename_inner(inner, name) for inner in _inner_configs(config))])


def _set_named(config: dict[str, Any], keys: Sequence[str], name: str) -> bool:
    changed = [key for key in keys if config.get(key) != name]
    config.update(dict.fromkeys(changed, name))
    return bool(changed)


def _inner_configs(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of a model's parts; a quantisation's own types are no such part."""
    return [
        value
        for key, value in config.items()
        if isinstance(value, dict)
        and (key.endswith("_config") or "model_type" in value)
        and key not in QUANTISATION_KEYS
    ]


def untie_different(directory: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """Say in config.json that the head has its own matrix, if one that differs from the embeddings is stored.

    `files` has the checksum of every tensor, by file and name. If only one of the two matrices is stored, or
    both are equal, config.json stays as it is.
    """
    path = directory / CONFIG
    stored = {name: value for tensors in files.values() for name, value in tensors.items()}
    heads = [value for name, value in stored.items() if name.endswith(_HEADS)]
    embeddings = [value for name, value in stored.items() if name.endswith(_EMBEDDINGS)]
    if not heads or not embeddings or set(heads) & set(embeddings) or not path.exists():
        return
    config = read_json_object(path)
    parts = [part for part in _inner_configs(config) if part.get(_TIED) is True]
    if config.get(_TIED) is not False or parts:
        for part in (config, *parts):
            part[_TIED] = False
        write_config(directory, config)
