"""Load the model to train and its tokenizer, with transformers or `svdconvert.models`."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svdconvert.checkpoint.renamed import as_family
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.execution import Run
from svdconvert.errors import ArtifactError, CheckpointError, MissingPackageError, brief
from svdconvert.layouts.base import Layout, LayoutFamily
from svdconvert.layouts.loading import generating_class, is_encoder_decoder
from svdconvert.output.sidecars import CONFIG, read_config, read_json_object
from svdconvert.training.data.images import require_pillow
from svdconvert.training.data.vision import ImageTextProcessor
from svdconvert.training.model.compare import require_complete, require_complete_body
from svdconvert.training.model.loading_progress import loading_reported
from svdconvert.training.model.quantised_loading import load_quantised, open_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where older versions of transformers keep a processor's chat template."""
_GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_network(path: Path, layout: Layout, dtype: torch.dtype | None, run: Run | None = None) -> nn.Module:
    """The language model of a directory or file, in `dtype` or, if that is None, as it is stored.

    It may take images too. Raises CheckpointError if it cannot be loaded, or if the checkpoint does not have
    all its weights, and ArtifactError for an encoder with a decoder.
    """
    run = run or Run()
    model: nn.Module
    if layout.family is not None:
        model = _family_module(layout.family).load(_family_tensors(path, layout.family), dtype)
        return model
    import transformers

    refuse_encoder_decoder(path)
    with _load_report_silenced():
        model, loaded = _load(
            getattr(transformers, generating_class(read_config(path))),
            path,
            layout,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=run.trust_remote_code,
        )
    require_complete(path, model, loaded, run.notify)
    return model


def _load(auto_class: Any, path: Path, layout: Layout, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The network and transformers' loading info; quantised matrices stay quantised."""
    source = open_quantised(path)
    if source is None:
        found: tuple[nn.Module, dict[str, Any]] = _from_pretrained(auto_class, path, **arguments)
        return found
    return load_quantised(source, layout, partial(_from_pretrained, auto_class), path, arguments)


def refuse_encoder_decoder(path: Path) -> None:
    """Raise ArtifactError for a model that reads one sequence and writes another, such as T5."""
    config = read_config(path) if (path / CONFIG).is_file() else {}
    if is_encoder_decoder(config):
        raise ArtifactError(
            f"{path} is an encoder with a decoder ({brief(config.get('model_type'))}), and train is for "
            "models that continue a text; train the adapter that decompose writes with PEFT, then merge or "
            "convert it"
        )


def load_classifier(  # noqa: PLR0913 (the model, its head, and how it is loaded)
    directory: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    labels: Sequence[str],
    seed: int,
    run: Run,
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """The model of a directory with a head for the classes `labels`, or for one number if there are none.

    Also returns the shapes of the parameters that must be trained in full: those of the head, and all that
    the checkpoint lacks, which are drawn with `seed`. Raises CheckpointError if transformers cannot load
    the model, or if the checkpoint lacks more than a pooler.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(labels)) or {0: "LABEL_0"}
    with torch.random.fork_rng(devices=[]), _load_report_silenced():
        torch.manual_seed(seed)
        model, loaded = _load(
            AutoModelForSequenceClassification,
            directory,
            layout,
            dtype=dtype or "auto",
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification" if labels else "regression",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=run.trust_remote_code,
        )
    require_complete_body(directory, model, loaded, run.notify)
    body = f"{model.base_model_prefix}."
    new_parameters = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(body) or name in loaded["missing_keys"]
    }
    return model, new_parameters


def head_shapes(
    directory: Path, labels: Sequence[str], stored: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that `load_classifier` would add; `stored` are the checkpoint's tensors.

    Builds the network without memory for its weights. Raises CheckpointError if transformers cannot.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(directory, num_labels=len(labels) or 1)
        with torch.device("meta"):
            make: Any = AutoModelForSequenceClassification
            model = make.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} has no classifier in transformers: {error}") from error
    body = f"{model.base_model_prefix}."
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(body) or not ({name, name.removeprefix(body)} & {*stored})
    }


def head_config(model: nn.Module) -> dict[str, Any]:
    """The entries of config.json that describe the head of a model from `load_classifier`."""
    config: Any = model.config
    return {
        "architectures": [type(model).__name__],
        "id2label": {str(number): name for number, name in config.id2label.items()},
        "label2id": dict(config.label2id),
        "problem_type": config.problem_type,
    }


def load_tokenizer(
    path: Path, layout: Layout, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory or file. Raises CheckpointError if there is none."""
    tokenizer: PreTrainedTokenizerBase
    if layout.family is not None:
        tensors = _family_tensors(path, layout.family)
        tokenizer = _family_module(layout.family).load_tokenizer(path, tensors)
        return tokenizer
    from transformers import AutoTokenizer

    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy its files into the directory"
        )
    tokenizer = _from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    if (path / _PROCESSOR_TEMPLATE).is_file():
        template = read_json_object(path / _PROCESSOR_TEMPLATE).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(f"{path / _PROCESSOR_TEMPLATE} holds no chat_template; fetch it again")
        tokenizer.chat_template = template
    return tokenizer


def has_processor(path: Path) -> bool:
    """True for the directory of a model that takes images, also if its processor is missing."""
    if any((path / name).exists() for name in PROCESSOR_FILES):
        return True
    return (path / CONFIG).is_file() and "vision_config" in read_config(path)


def load_processor(path: Path, *, trust_remote_code: bool = False) -> ImageTextProcessor:
    """The processor of a model that takes texts and images.

    Raises CheckpointError if there is none that can be used, MissingPackageError if it needs a package that
    is not installed.
    """
    require_pillow()
    from transformers import AutoProcessor

    if not any((path / name).exists() for name in PROCESSOR_FILES):
        raise CheckpointError(
            f"{path} holds no processor of images ({', '.join(PROCESSOR_FILES)}); copy its files into the "
            "directory"
        )
    with _load_report_silenced():
        try:
            processor = _from_pretrained(AutoProcessor, path, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            if "torchvision" in str(error) and find_spec("torchvision") is None:
                raise MissingPackageError(
                    f'the processor of {path} needs torchvision: pip install "svdconvert[vision]"'
                ) from error
            raise
    place = getattr(processor, "image_token", None)
    if getattr(processor, "tokenizer", None) is None or not isinstance(place, str):
        raise CheckpointError(
            f"{type(processor).__name__}, the processor of {path}, has no tokenizer with a token for images, "
            "so train cannot use rows with images for this model; leave the images out"
        )
    if getattr(processor, "chat_template", None):
        processor.tokenizer.chat_template = processor.chat_template
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return ImageTextProcessor(processor, place)


def _family_module(family: LayoutFamily) -> Any:
    """The module of `svdconvert.models` that implements the family."""
    return import_module(f"svdconvert.models.{family.name}")


def _family_tensors(path: Path, family: LayoutFamily) -> TensorSource:
    return as_family(open_checkpoint(path), family.rules, str(path))


def _from_pretrained(auto_class: Any, directory: Path, **arguments: Any) -> Any:
    """`from_pretrained` of a directory; its weights may be given as `state_dict`."""
    try:
        with loading_reported():
            if "state_dict" in arguments:
                return _from_tensors(auto_class, directory, **arguments)
            return auto_class.from_pretrained(directory, local_files_only=True, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        name = auto_class.__name__
        what = "the model" if "Model" in name else "the processor" if "Processor" in name else "the tokenizer"
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot load {what} of {directory}: {reason}") from error


def _from_tensors(auto_class: Any, directory: Path, *, config: Any, **arguments: Any) -> Any:
    """`from_pretrained` with the weights as `state_dict`, for which transformers must not get a directory."""
    from transformers import GenerationConfig

    # Auto classes need a directory, so the class is taken from a network without weights.
    with torch.device("meta"):
        outline = auto_class.from_config(config, trust_remote_code=arguments.pop("trust_remote_code"))
    model, loaded = type(outline).from_pretrained(None, config=outline.config, **arguments)
    model.config.name_or_path = str(directory)
    if (directory / _GENERATION_CONFIG).is_file() and getattr(model, "generation_config", None):
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model, loaded


@contextmanager
def _load_report_silenced() -> Iterator[None]:
    """Suppress the report of transformers on missing and other tensors: `compare` says what matters."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
