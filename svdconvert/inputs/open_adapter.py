"""Opens adapters in every supported format, each as an AdapterDelta."""

from dataclasses import replace
from pathlib import Path

from svdconvert.adapters.adapter_config import CONFIG, KASA
from svdconvert.adapters.peft_files import WEIGHTS, Adapter, is_adapter, open_adapter
from svdconvert.adapters.rwkv_peft import FILE, is_adapter_file, open_adapter_file
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.base_shapes import BaseShapes
from svdconvert.inputs.gguf_names import FILE as GGUF_FILE
from svdconvert.inputs.sources import NO_INIT, Sources
from svdconvert.manifest.compared import ComparedSource
from svdconvert.manifest.fingerprint import file_checksum
from svdconvert.manifest.schema import PLAIN, Manifest, has_manifest, read_manifest
from svdconvert.methods.base import init_folder
from svdconvert.output.ownership import MANIFEST_NAME

# PEFT's names of initial states that are subtracted from the base.
_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga", "loftq", KASA)


def is_any_adapter(name: str | Path) -> bool:
    """True for what `open_adapter_delta` opens, False for a plain checkpoint."""
    path = fetch(str(name), "sidecars").path
    if has_manifest(path):
        return read_manifest(path).kind not in PLAIN
    if is_adapter_file(path):
        return any(".lora_A" in name for name in open_file(path).infos)
    return is_adapter(path)


def open_initial_adapter(directory: Path, manifest: Manifest) -> Adapter:
    """The initial adapter of a directory, without comparing it with the manifest's checksums."""
    return open_adapter(directory / init_folder(manifest.method), compare=False)


def open_adapter_delta(
    adapter: str | Path, sources: Sources | None = None, alpha: float | None = None
) -> AdapterDelta:
    """Open a DECOMPOSED, TRAINED or LORA directory, any adapter in PEFT's format, or RWKV-PEFT's file.

    `adapter` and the strings of `sources` may be local or org/name[@revision]. `alpha` is the lora_alpha of
    an RWKV-PEFT file, which does not store it. Raises ArtifactError if the initial adapter is missing or
    does not fit.
    """
    sources = sources or Sources()
    snapshot = fetch(str(adapter), "adapter")
    if is_adapter_file(snapshot.path):
        return _from_rwkv_file(snapshot.path, sources.init, alpha)
    if alpha is not None:
        raise ArtifactError(f"{snapshot.path} stores its own alpha; --alpha is for files of RWKV-PEFT")
    if not snapshot.path.is_dir():
        raise ArtifactError(
            f"{snapshot.path} is not a directory; give a directory that decompose or train wrote, or an "
            "adapter"
        )
    residual = fetch(sources.residual, "adapter") if sources.residual else None
    init = Path(sources.init) if sources.init not in (None, NO_INIT) else None
    open_directory = _from_manifest if has_manifest(snapshot.path) else _from_peft
    shapes = BaseShapes(snapshot.path, sources.base, sources.trust_remote_code)
    delta = open_directory(snapshot, residual, init, shapes)
    delta = replace(delta, uses_base=shapes.used)
    if sources.init == NO_INIT:
        delta = replace(delta, is_assumed_zero=False)
    if delta.initial_adapter is not None:
        _refuse_misfit(delta.adapter, delta.initial_adapter)
    return delta


def is_subtracted(initialised: str | bool) -> bool:
    """True if PEFT subtracts an initial adapter of this `init_lora_weights` from the base."""
    return str(initialised).lower().startswith(_SUBTRACTED)


def _from_rwkv_file(path: Path, init: str | None, alpha: float | None) -> AdapterDelta:
    """RWKV-PEFT's file: PiSSA with the file of its initial factors, or a LoRA with its alpha."""
    if init not in (None, NO_INIT):
        if alpha is not None:
            raise ArtifactError(f"{path} started from {init}, at scale 1; leave --alpha out")
        initial = open_adapter_file(Path(str(init)), None)
        adapter = open_adapter_file(path, None)
        _refuse_misfit(adapter, initial)
        return AdapterDelta(path, adapter, initial, None)
    adapter = open_adapter_file(path, alpha)
    if alpha is None:
        raise ArtifactError(
            f"{path} does not store its scale; give the lora_alpha of its training with --alpha or, for "
            "PiSSA, its init_pissa.pth with --init"
        )
    return AdapterDelta(path, adapter, None, None)


def _from_manifest(
    snapshot: Snapshot, residual: Snapshot | None, init: Path | None, shapes: BaseShapes
) -> AdapterDelta:
    """A directory that svdconvert wrote."""
    directory = snapshot.path
    manifest = read_manifest(directory)
    if manifest.kind in PLAIN:
        raise ArtifactError(
            f"{directory} is {manifest.kind} already: it is a plain checkpoint and needs no merge"
        )
    if manifest.kind == "lora":
        if GGUF_FILE in manifest.files:
            raise ArtifactError(
                f"{directory} is for llama.cpp, whose order of rows svdconvert does not read; use what "
                "it was made from"
            )
        file = directory / FILE
        if file.is_file():
            return AdapterDelta(directory, open_adapter_file(file, None), None, manifest)
        return AdapterDelta(directory, open_adapter(directory), None, manifest)
    start = init or directory / init_folder(manifest.method)
    if not is_adapter(start):
        if residual is not None:
            return _on_residual(directory, open_adapter(directory), residual, None, manifest)
        raise ArtifactError(
            f"{start} is missing, and without the initial adapter the delta is unknown; copy it from the "
            "decomposed directory, give another one with --init, or give --base and --residual to recover it"
        )
    initial = open_adapter(start)
    adapter = initial if manifest.kind == "decomposed" else open_adapter(directory)
    _refuse_misfit(adapter, initial)
    initial = _listed_in(directory, initial, manifest)
    if manifest.kind == "decomposed":
        return AdapterDelta(directory, initial, initial, manifest, residual or snapshot)
    return AdapterDelta(directory, adapter, initial, manifest)


def _from_peft(
    snapshot: Snapshot, residual: Snapshot | None, init: Path | None, shapes: BaseShapes
) -> AdapterDelta:
    """An adapter in PEFT's format that svdconvert did not write."""
    directory = snapshot.path
    if not is_adapter(directory):
        raise ArtifactError(
            f"{directory} is neither a directory of svdconvert nor an adapter: there is no svdconvert.json "
            "and no adapter_config.json; give what decompose, train or PEFT wrote"
        )
    adapter = open_adapter(directory, shapes.find)
    if residual is None and init is None and (owner := _owner(directory)) is not None:
        # An untrained initial adapter, given by its own directory.
        return AdapterDelta(directory, adapter, adapter, read_manifest(owner), None)
    residual = residual or _named_residual(adapter)
    if residual is not None:
        return _on_residual(directory, adapter, residual, init, None)
    init = init or _init_below(directory)
    if init is None and (named := _local_base(adapter)) and (init := _init_below(named)):
        residual = fetch(str(named), "adapter")  # a residual that PEFT wrote, with its initial adapter
    if init is not None:
        return AdapterDelta(directory, adapter, open_adapter(init), None, residual)
    subtracted = is_subtracted(adapter.config.initialised) or adapter.config.base_is_residual is True
    from_zero = adapter.config.dora or adapter.config.initialised == "mica"
    unknown = not (subtracted or from_zero) and adapter.config.base_is_residual is None
    return AdapterDelta(directory, adapter, None, None, is_lost=subtracted, is_assumed_zero=unknown)


def _owner(directory: Path) -> Path | None:
    """The directory whose manifest lists `directory` as its initial adapter; None if there is none."""
    parent = directory.absolute().parent
    if has_manifest(parent) and read_manifest(parent).init_directory == directory.name:
        return parent
    return None


def _init_below(directory: Path) -> Path | None:
    """The only subdirectory named *_init with an adapter; None if there are none or several."""
    found = [path for path in sorted(directory.glob("*_init")) if is_adapter(path)]
    return found[0] if len(found) == 1 else None


def _named_residual(adapter: Adapter) -> Snapshot | None:
    """The decomposed directory that an adapter's configuration names as its base, if there is one."""
    base = _local_base(adapter)
    if base is not None and has_manifest(base) and read_manifest(base).kind == "decomposed":
        return fetch(str(base), "adapter")
    return None


def _local_base(adapter: Adapter) -> Path | None:
    """The directory that an adapter's configuration names as its base, if it is one."""
    base = Path(adapter.config.base) if adapter.config.base else None
    return base if base is not None and base.is_dir() else None


def _on_residual(
    directory: Path, adapter: Adapter, residual: Snapshot, init: Path | None, known: Manifest | None
) -> AdapterDelta:
    """An adapter that was trained on `residual`. Without `init`, its initial adapter is there or lost."""
    manifest = known
    initial = open_adapter(init) if init is not None and is_adapter(init) else None
    if has_manifest(residual.path):
        found = read_manifest(residual.path)
        if found.kind != "decomposed":
            raise ArtifactError(
                f"{residual.path} is a {found.kind} directory; --residual needs what decompose wrote, or a "
                "plain residual"
            )
        manifest = known or found
        folder = init_folder(found.method)
        if initial is None and is_adapter(residual.path / folder):
            initial = open_adapter(residual.path / folder)
        elif initial is not None:
            initial = _listed_in(residual.path, initial, found)
    if initial is not None:
        return AdapterDelta(directory, adapter, initial, manifest, residual)
    return AdapterDelta(directory, adapter, None, manifest, residual, is_lost=True)


def _listed_in(directory: Path, initial: Adapter, manifest: Manifest) -> Adapter:
    """The initial adapter from another place, which must be the one that the manifest of `directory` lists.

    Raises ArtifactError if its configuration is another one; other tensors are refused when they are read.
    """
    folder = init_folder(manifest.method)
    files = manifest.files.get(f"{folder}/{WEIGHTS}")
    known = manifest.sidecars.get(f"{folder}/{CONFIG}")
    advice = f"give the initial adapter of {directory} with --init"
    if known is not None and file_checksum(initial.directory / CONFIG) != known:
        raise ArtifactError(
            f"{initial.directory / CONFIG} is not the configuration that {directory / MANIFEST_NAME} lists, "
            f"and another scale or rank would give a different model; {advice}"
        )
    if files is None:
        return initial
    source = ComparedSource(initial.source, {initial.directory / WEIGHTS: files}, directory, advice)
    return replace(initial, source=source)


def _refuse_misfit(adapter: Adapter, initial: Adapter) -> None:
    if absent := sorted(set(adapter.modules) ^ set(initial.modules)):
        raise ArtifactError(
            f"{initial.directory} is not the initial adapter of {adapter.directory}: {absent[0]} is in one "
            f"only ({len(absent)} such modules); give the right one with --init"
        )
    for module in adapter.modules:
        for factor, side in (("lora_A", 1), ("lora_B", 0)):
            now = adapter.shape(module, factor)
            before = initial.shape(module, factor)
            if now[side] != before[side]:
                raise ArtifactError(
                    f"{initial.directory} is not the initial adapter of {adapter.directory}: "
                    f"{module}.{factor} has the shape {before} and {now}; give the right one with --init"
                )
