"""Convert checkpoints of any size for SVD-based fine-tuning, train the adapters, and convert them back.

Each command is a function of the same name. Names are imported on first use, so that `import svdconvert` is
instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svdconvert.version import __version__ as __version__

if TYPE_CHECKING:
    from svdconvert.commands.chat import chat
    from svdconvert.commands.combine import combine
    from svdconvert.commands.convert import convert
    from svdconvert.commands.decompose import decompose
    from svdconvert.commands.diff import diff
    from svdconvert.commands.doctor import doctor
    from svdconvert.commands.evaluate import evaluate
    from svdconvert.commands.extract import extract
    from svdconvert.commands.inspect import inspect
    from svdconvert.commands.list_plugins import list_plugins
    from svdconvert.commands.merge import merge
    from svdconvert.commands.push import push
    from svdconvert.commands.report import report
    from svdconvert.commands.to_lora import to_lora
    from svdconvert.commands.train import train
    from svdconvert.commands.verify import verify, verify_merge
    from svdconvert.config.chat import ChatOptions
    from svdconvert.config.combine import CombineOptions
    from svdconvert.config.evaluation import EvaluationOptions
    from svdconvert.config.execution import Run
    from svdconvert.config.options import (
        ConvertOptions,
        ExtractOptions,
        LoraOptions,
        MergeOptions,
        PushOptions,
        SplitOptions,
    )
    from svdconvert.config.progress import Progress
    from svdconvert.config.train import TrainOptions, TrainPlan
    from svdconvert.errors import SvdConvertError
    from svdconvert.manifest.evaluations import EvaluationResult, read_evaluations
    from svdconvert.manifest.schema import Manifest, read_manifest

__all__ = [
    "ChatOptions",
    "CombineOptions",
    "ConvertOptions",
    "EvaluationOptions",
    "EvaluationResult",
    "ExtractOptions",
    "LoraOptions",
    "Manifest",
    "MergeOptions",
    "Progress",
    "PushOptions",
    "Run",
    "SplitOptions",
    "SvdConvertError",
    "TrainOptions",
    "TrainPlan",
    "chat",
    "combine",
    "convert",
    "decompose",
    "diff",
    "doctor",
    "evaluate",
    "extract",
    "inspect",
    "list_plugins",
    "merge",
    "push",
    "read_evaluations",
    "read_manifest",
    "report",
    "to_lora",
    "train",
    "verify",
    "verify_merge",
]

_MODULES = {
    "ChatOptions": "config.chat",
    "CombineOptions": "config.combine",
    "ConvertOptions": "config.options",
    "EvaluationOptions": "config.evaluation",
    "EvaluationResult": "manifest.evaluations",
    "ExtractOptions": "config.options",
    "LoraOptions": "config.options",
    "Manifest": "manifest.schema",
    "MergeOptions": "config.options",
    "Progress": "config.progress",
    "PushOptions": "config.options",
    "Run": "config.execution",
    "SplitOptions": "config.options",
    "SvdConvertError": "errors",
    "TrainOptions": "config.train",
    "TrainPlan": "config.train",
    "read_evaluations": "manifest.evaluations",
    "read_manifest": "manifest.schema",
    "verify_merge": "commands.verify",
}
"""Exported name -> its module; a command's function is in the module of the same name."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, f'commands.{name}')}"), name)
