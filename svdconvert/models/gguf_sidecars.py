"""The configuration and the tokenizer that a GGUF file holds, as the files of a model's directory."""

from pathlib import Path
from typing import Any

from svdconvert.errors import CheckpointError


def write_sidecars(file: Path, directory: Path) -> None:
    """Write config.json and the tokenizer's files of a GGUF file into `directory`, with transformers.

    Raises CheckpointError if transformers cannot read them.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        network: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        config.architectures = [network.__name__]
        config.dtype = "bfloat16"
        config.save_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # whatever follows from a file that transformers did not write
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"transformers cannot read the configuration and the tokenizer of {file}: {reason}"
        ) from error
