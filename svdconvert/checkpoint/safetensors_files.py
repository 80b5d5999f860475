"""Open a checkpoint: its headers are read at once, its tensors one at a time."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.checkpoint.file_names import is_weights, name_fault
from svdconvert.checkpoint.header import Extent, header_length, parse_header
from svdconvert.checkpoint.json_text import read_json
from svdconvert.checkpoint.regular_file import OpenFiles, open_regular
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, read_whole, versions_of_files
from svdconvert.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"

# Model types whose config.json ties the head to the embeddings if it does not say otherwise.
_TIED_BY_DEFAULT = ("gemma", "gpt2", "opt", "bloom")

ENDINGS = (".pth", ".st", ".gguf")
"""Suffixes of files that are a checkpoint by themselves."""
_FILES = (*ENDINGS, ".safetensors", ".bin")


def open_checkpoint(directory: Path) -> TensorSource:
    """The tensors of a model: a directory of safetensors (preferred) or PyTorch .bin, or a single file.

    Raises ModelNotFoundError if `directory` does not exist, CheckpointError if it holds no checkpoint or
    a file of the checkpoint is missing or damaged.
    """
    if not directory.exists():
        raise ModelNotFoundError(f"{directory} does not exist; give a model directory, or a file of tensors")
    if not directory.is_dir():
        return _open_single(directory)
    if (directory / SINGLE).exists():  # transformers reads a single file that is next to an index
        return SafetensorsSource([directory / SINGLE])
    if (directory / INDEX).exists():
        return SafetensorsSource.indexed(directory)
    pickled = [directory / name for name in (PICKLED_SINGLE, PICKLED_INDEX) if (directory / name).exists()]
    if not pickled:
        return open_file(_lone_file(directory))
    from svdconvert.checkpoint.torch_files import PickledSource

    if pickled[0].name == PICKLED_SINGLE:
        return PickledSource(pickled[:1])
    weight_map = _local_index(pickled[0])
    return PickledSource([directory / file for file in shard_names(weight_map)], weight_map)


def _open_single(path: Path) -> TensorSource:
    """A checkpoint that is one file. Raises CheckpointError for another file, or one of several shards."""
    if path.suffix not in _FILES:
        raise CheckpointError(
            f"{path} is a file; give the directory that holds the model and its config.json, or a "
            f"file that ends in {', '.join(_FILES)}"
        )
    for index in (path.parent / INDEX, path.parent / PICKLED_INDEX):
        if index.exists() and path.name in (files := shard_names(read_index(index))) and len(files) > 1:
            raise CheckpointError(f"{path} is one of {len(files)} files of a model; give {path.parent}")
    return open_file(path)


def directory_of(path: Path) -> Path:
    """The directory of a model's only file of weights if config.json is in it; any other path as it is."""
    folder = path.parent
    others = {SINGLE: (), PICKLED_SINGLE: (SINGLE, INDEX)}.get(path.name)
    if others is None or not path.is_file() or not (folder / "config.json").is_file():
        return path
    return path if any((folder / other).exists() for other in others) else folder


def holds_model(directory: Path) -> bool:
    """True if a directory has weights of a model under the names that loaders look for."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX, PICKLED_SINGLE, PICKLED_INDEX))


def open_file(path: Path) -> TensorSource:
    """The tensors of one file: PyTorch's format if it ends in .pth or .bin, GGUF's, else safetensors."""
    if path.suffix == ".gguf":
        from svdconvert.checkpoint.gguf_file import GgufFile

        return GgufFile(path)
    if path.suffix not in (".pth", ".bin"):
        return SafetensorsSource([path])
    from svdconvert.checkpoint.torch_files import PickledSource

    return PickledSource([path])


def _lone_file(directory: Path) -> Path:
    """The checkpoint file of a directory without an index. Raises CheckpointError unless there is one."""
    content = sorted(directory.iterdir())
    found = [path for path in content if path.suffix in ENDINGS and path.is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise CheckpointError(f"{directory} holds several checkpoints ({names}); give one of these files")
    if not found:
        state = "holds no model weights" if content else "is empty"
        raise CheckpointError(
            f"{directory} {state}; expected {SINGLE}, {INDEX}, {PICKLED_SINGLE}, {PICKLED_INDEX} or a .pth"
        )
    return found[0]


def read_index(path: Path) -> Mapping[str, str]:
    """The tensor -> shard mapping of an index.

    Raises CheckpointError if it is malformed or names a shard that is hidden, in another directory than its
    own, or of a kind that holds no tensors.
    """
    try:
        weight_map = read_json(path)["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint index (JSON with a weight_map); fetch it again"
        ) from error
    for name, file in entries.items():
        fault = "is outside the checkpoint's directory" if "/" in file else name_fault(file)
        if fault is None and not is_weights(file):
            fault = "is no file of tensors"
        if fault:
            raise CheckpointError(
                f"{path} places {name} in {file!r}, which {fault}; "
                "fetch the checkpoint from a source that you trust"
            )
    return entries


def _local_index(path: Path) -> Mapping[str, str]:
    """`read_index`, for a checkpoint on disk. Raises CheckpointError if a shard is missing."""
    entries = read_index(path)
    if absent := [file for file in shard_names(entries) if not (path.parent / file).is_file()]:
        raise CheckpointError(
            f"{path} names {', '.join(absent[:3])}, which does not exist; fetch the missing shard"
        )
    return entries


def shard_names(weight_map: Mapping[str, str]) -> list[str]:
    """The files of an index, sorted by name."""
    return sorted(set(weight_map.values()))


def locate_tensors(
    headers: Iterable[tuple[Path, list[Extent]]], weight_map: Mapping[str, str] | None
) -> dict[str, tuple[Path, Extent]]:
    """Tensor -> its file and extent. The index decides if several files hold a tensor of one name."""
    found: dict[str, tuple[Path, Extent]] = {}
    for file, extents in headers:
        for extent in extents:
            name = extent.info.name
            if weight_map is None or weight_map.get(name, file.name) == file.name:
                found[name] = (file, extent)
    return found


def refuse_misplaced(weight_map: Mapping[str, str], known: Collection[str], index: Path) -> None:
    """Raise CheckpointError if a shard lacks a tensor that the index places in it.

    A head that is tied to the embeddings may be absent: loaders take the embeddings for it.
    """
    for name, file in weight_map.items():
        if name not in known and not (name.endswith("lm_head.weight") and _ties_head(index.parent)):
            raise CheckpointError(
                f"{index} places {name} in {file}, which does not hold it; fetch them again"
            )


def _ties_head(directory: Path) -> bool:
    """True if config.json, or the default of its model type, ties the head to the embeddings."""
    try:
        config = read_json(directory / "config.json")
        default = str(config.get("model_type")).startswith(_TIED_BY_DEFAULT)
        return config.get("tie_word_embeddings", default) is True
    except (OSError, ValueError, AttributeError):
        return False


class SafetensorsSource:
    """A TensorSource over safetensors files."""

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._open = OpenFiles()
        self._files = files
        self._extents = locate_tensors(((file, read_header(file)) for file in files), weight_map)
        self.infos: Mapping[str, TensorInfo] = {
            name: extent.info for name, (_, extent) in self._extents.items()
        }

    @classmethod
    def indexed(cls, directory: Path) -> "SafetensorsSource":
        """The shards of a directory with an index."""
        weight_map = _local_index(directory / INDEX)
        source = cls([directory / file for file in shard_names(weight_map)], weight_map)
        refuse_misplaced(weight_map, source.infos, directory / INDEX)
        return source

    def read(self, name: str) -> "Tensor":
        """The tensor in its stored dtype, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        path, extent = self._extents[name]
        begin, end, _ = (section or slice(None)).indices(extent.info.nbytes)
        span = range(extent.begin + begin, extent.begin + end)
        return self._open.chunks(path, span, name, size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of every file."""
        return versions_of_files(self._files)

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        self._open.close()


def read_header(file: Path) -> list[Extent]:
    """The tensors of one safetensors file, ordered by offset. Raises CheckpointError if it is damaged."""
    try:
        with open(open_regular(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = header_length(stream.read(8), str(file), size)
            return parse_header(stream.read(length), str(file), size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; restore the file") from error
