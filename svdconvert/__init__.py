"""Convert checkpoints of any size for SVD-based fine-tuning, train the adapters, and convert them back.

Each verb of the command line is a function of the same name. They are imported on first use, so that
`import svdconvert` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdconvert.artifact.manifest import Manifest, read_manifest
    from svdconvert.artifact.options import (
        ConvertOptions,
        LoraOptions,
        MergeOptions,
        PushOptions,
        SplitOptions,
    )
    from svdconvert.errors import SvdConvertError
    from svdconvert.run import Run
    from svdconvert.training.plan import TrainPlan
    from svdconvert.verbs.convert import convert
    from svdconvert.verbs.decompose import decompose
    from svdconvert.verbs.inspect import inspect
    from svdconvert.verbs.merge import merge
    from svdconvert.verbs.push import push
    from svdconvert.verbs.to_lora import to_lora
    from svdconvert.verbs.train import train
    from svdconvert.verbs.verify import verify

__all__ = [
    "ConvertOptions",
    "LoraOptions",
    "Manifest",
    "MergeOptions",
    "PushOptions",
    "Run",
    "SplitOptions",
    "SvdConvertError",
    "TrainPlan",
    "convert",
    "decompose",
    "inspect",
    "merge",
    "push",
    "read_manifest",
    "to_lora",
    "train",
    "verify",
]

_HOMES = {
    "ConvertOptions": "artifact.options",
    "LoraOptions": "artifact.options",
    "Manifest": "artifact.manifest",
    "MergeOptions": "artifact.options",
    "PushOptions": "artifact.options",
    "Run": "run",
    "SplitOptions": "artifact.options",
    "SvdConvertError": "errors",
    "TrainPlan": "training.plan",
    "read_manifest": "artifact.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, f'verbs.{name}')}"), name)
