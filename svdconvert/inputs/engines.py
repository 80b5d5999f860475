"""What an inference engine refuses or ignores of an adapter, judged by its configuration and its header.

The engines' own readers decide: vLLM's PEFTHelper (vllm/lora/peft_helper.py), SGLang's LoRAConfig and
LoRAAdapter (python/sglang/srt/lora), mlx-lm's load_adapters (mlx_lm/tuner/utils.py), llama.cpp's
convert_lora_to_gguf.py, and PEFT's LoraConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svdconvert.adapters import mlx
from svdconvert.adapters.adapter_config import CONFIG
from svdconvert.adapters.peft_files import PICKLED, WEIGHTS
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError, brief
from svdconvert.inputs.gguf_names import FILE as GGUF_FILE
from svdconvert.layouts.loading import vllm_advice
from svdconvert.methods.base import METHODS
from svdconvert.output.sidecars import read_json_object

Engine = Literal["peft", "vllm", "sglang", "mlx", "llama.cpp"]
FORMATS: Mapping[Engine, str] = {
    "peft": "peft",
    "vllm": "vllm",
    "sglang": "vllm",
    "mlx": "mlx",
    "llama.cpp": "gguf",
}
"""Engine -> the format of `to-lora` that it loads without loss."""


_FACTORS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
_BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


@dataclass(frozen=True)
class EngineReport:
    """What one engine makes of an adapter."""

    engine: Engine
    refused: list[str] = field(default_factory=list)
    """Why it does not load."""
    ignored: list[str] = field(default_factory=list)
    """What it loads wrongly or not at all, without an error."""
    needed: list[str] = field(default_factory=list)
    """What the engine must be told."""

    @property
    def loads(self) -> bool:
        """True if nothing is refused or ignored."""
        return not (self.refused or self.ignored)


@dataclass(frozen=True)
class _Files:
    """The raw content of an adapter's directory: no value of it is trusted."""

    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    format: Literal["peft", "mlx", "gguf", "rwkv-peft"]

    def pattern(self, name: str) -> Mapping[str, Any]:
        """A pattern of the configuration; empty if it is none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def others(self) -> list[str]:
        """Tensors that are no low-rank factors of a linear layer."""
        return [name for name in self.infos if not name.endswith(_FACTORS)]


def report_for(path: Path, engine: Engine) -> EngineReport:
    """What `engine` will refuse or ignore of the adapter. Raises ArtifactError if it is none."""
    files = _open(path)
    if engine == "mlx":
        return _mlx(files)
    if engine == "llama.cpp":
        return _llama_cpp(files)
    if files.format != "peft":
        return EngineReport(engine, [f"it is in the format {files.format}, and {engine} reads PEFT's"])
    return {"peft": _peft, "vllm": _vllm, "sglang": _sglang}[engine](files)


def _open(path: Path) -> _Files:
    if path.is_file() and path.suffix == ".pth":
        return _Files({}, open_file(path).infos, "rwkv-peft")
    if (path / GGUF_FILE).is_file():
        return _Files({}, open_file(path / GGUF_FILE).infos, "gguf")
    if mlx.is_adapter(path):
        return _Files(read_json_object(path / CONFIG), open_file(path / mlx.WEIGHTS).infos, "mlx")
    for name in (WEIGHTS, PICKLED):
        if (path / CONFIG).is_file() and (path / name).is_file():
            return _Files(read_json_object(path / CONFIG), open_file(path / name).infos, "peft")
    if written := sorted(path.glob("*.pth")):
        return _Files({}, open_file(written[0]).infos, "rwkv-peft")
    raise ArtifactError(f"{path} is no adapter, and --for is about adapters; give one, or leave --for out")


def _peft(files: _Files) -> EngineReport:
    report = EngineReport("peft")
    kind = files.config.get("peft_type")
    own = {method.peft_type for method in METHODS.load_all()[0].values()} - {"LORA"}
    if str(kind) in own or str(kind).startswith("LORA_"):
        report.refused.append(
            f"its peft_type {brief(kind)} is svdconvert's, for what PEFT would load wrongly"
        )
    mapping = files.config.get("auto_mapping")
    entry = mapping.get("svdconvert") if isinstance(mapping, dict) else None
    if isinstance(entry, dict) and entry.get("base_is_residual") is True:
        report.ignored.append("that it belongs to a residual base: on the untouched base it is wrong")
    return report


def _vllm(files: _Files) -> EngineReport:
    report = EngineReport("vllm")
    _refuse_kinds(files, report)
    if files.config.get("bias", "none") != "none":
        report.refused.append(f"bias is {brief(files.config.get('bias'))}")
    if files.config.get("modules_to_save"):
        report.refused.append("modules_to_save names modules that are trained in full")
    _note_patterns(files, report)
    _note_rank(files, report)
    others = [name for name in files.others if not name.endswith(_EMBEDDING_FACTORS)]
    if odd := [name for name in others if not name.endswith(_BASE_EMBEDDINGS)]:
        report.refused.append(f"it holds {odd[0]}, which is no factor ({len(odd)} such tensors)")
    _note_others(others, report)
    return report


def _sglang(files: _Files) -> EngineReport:
    report = EngineReport("sglang")
    _refuse_kinds(files, report)
    if files.config.get("use_rslora"):
        report.ignored.append("use_rslora: it scales by alpha / rank")
    _note_patterns(files, report)
    _note_others(files.others, report)
    return report


def _refuse_kinds(files: _Files, report: EngineReport) -> None:
    kind = files.config.get("peft_type")
    if kind != "LORA":
        report.refused.append(f"its peft_type is {brief(kind)}, and the engine reads LORA")
    if files.config.get("use_dora"):
        report.refused.append("it is a DoRA")


def _note_patterns(files: _Files, report: EngineReport) -> None:
    """One rank and one scale are read for all modules."""
    for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = [value for value in files.pattern(name).values() if value != files.config.get(default)]
        if values:
            report.ignored.append(f"{name}, which gives {len(values)} modules another value: wrong scales")


def _note_rank(files: _Files, report: EngineReport) -> None:
    rank = files.config.get("r")
    if isinstance(rank, int) and not isinstance(rank, bool) and (advice := vllm_advice(rank)):
        (report.needed if advice.startswith("--") else report.refused).append(advice)


def _note_others(others: list[str], report: EngineReport) -> None:
    if others and not report.refused:
        report.ignored.append(f"{others[0]} ({len(others)} tensors that are no factors)")


def _mlx(files: _Files) -> EngineReport:
    report = EngineReport("mlx")
    if files.format != "mlx":
        report.refused.append(f"it is in the format {files.format}, and mlx-lm reads its own")
        return report
    if files.config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        report.refused.append(f"fine_tune_type is {brief(files.config.get('fine_tune_type'))}")
    parameters = files.config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters or "rank" not in parameters:
        report.refused.append("lora_parameters has no rank or scale")
    odd = [name for name in files.infos if name.rpartition(".")[2] not in ("lora_a", "lora_b", "m")]
    if odd:
        report.refused.append(f"it holds {odd[0]}, which is no factor ({len(odd)} such tensors)")
    return report


def _llama_cpp(files: _Files) -> EngineReport:
    report = EngineReport("llama.cpp")
    if files.format == "gguf":
        return report
    report.refused.append(f"it is in the format {files.format}, and llama.cpp reads GGUF")
    if files.format == "peft":
        others = [name for name in files.others if not name.endswith(_EMBEDDING_FACTORS)]
        norms = [name for name in others if "_layernorm" in name or ".norm" in name]
        passed = {*norms, *(name for name in others if ".base_layer.weight" in name)}
        if odd := [name for name in others if name not in passed]:
            report.refused.append(f"its converter stops at {odd[0]}, which is no factor")
        if norms:
            report.ignored.append(f"{norms[0]} ({len(norms)} norms, which are converted and not applied)")
        if files.config.get("use_rslora"):
            report.ignored.append("use_rslora: its converter keeps lora_alpha, which is divided by the rank")
        if files.pattern("alpha_pattern"):
            report.ignored.append("alpha_pattern: its converter keeps one lora_alpha")
    return report
