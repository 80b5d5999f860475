"""Under which heading of `--help` an option stands, and what its value is called.

An option of a class that has no entry here stands under the heading that its command gives, and its value is
called after its type.
"""

from collections.abc import Mapping

ARGUMENTS = "Arguments"
RESULT = "Result"
DATA = "Data"
ADAPTER = "Adapter"
NEW_ADAPTER = "New adapter, of a plain MODEL"
OPTIMIZER = "Optimizer"
EVALUATION = "Evaluation"
ANSWERS = "Answers"
PRECISION = "Precision"
INPUTS = "Inputs"
SAVING = "Saving"
MEMORY = "Memory and speed"
TRACKING = "Tracking"
PUBLISHING = "Publishing"
OTHERS = "Options"
GENERAL = "General"

ORDER = (
    NEW_ADAPTER, ADAPTER, RESULT, DATA, OPTIMIZER, EVALUATION, ANSWERS, PRECISION, INPUTS, SAVING, MEMORY,
    TRACKING, OTHERS, PUBLISHING, GENERAL,
)  # fmt: skip
"""The headings from top to bottom."""

_ADAPTER = (
    "method", "init", "rank", "alpha", "rank_pattern", "alpha_pattern", "rslora", "targets", "experts",
    "layout",
)  # fmt: skip
_TRAIN = {
    DATA: (
        "data", "data_weights", "split", "task", "text_fields", "label_field", "image_dir", "prompt_field",
        "response_field", "template", "ending", "max_length", "too_long", "packing", "prompt_loss",
    ),
    OPTIMIZER: (
        "lr", "steps", "epochs", "batch_size", "accumulate", "warmup", "schedule", "weight_decay", "clip",
        "penalty", "penalty_rule", "corrected_gradient", "seed",
    ),
    EVALUATION: (
        "eval_data", "eval_rows", "eval_split", "eval_every", "patience", "keep_best", "samples",
        "sample_tokens",
    ),
    ADAPTER: ("dropout", "train_also"),
    MEMORY: ("precision", "attention", "gradient_checkpointing", "device"),
    SAVING: ("save_every", "save_limit", "keep_checkpoints"),
    TRACKING: ("track", "track_dir"),
}  # fmt: skip
_SPLIT = {
    ADAPTER: (*_ADAPTER, "dropout", "seed"),
    PRECISION: (
        "svd", "tol", "dtype", "residual_dtype", "residual_format", "quant_start", "quant_iterations",
        "double_quant", "nuclear_ratio",
    ),
    SAVING: ("max_shard_size", "copy_base"),
}  # fmt: skip
_GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "TrainOptions": _TRAIN,
    "SplitOptions": _SPLIT,
    "ChatOptions": {
        ANSWERS: ("max_new_tokens", "temperature", "top_p", "seed", "template"),
        PRECISION: ("dtype",),
    },
    "PushOptions": {PUBLISHING: ("private", "revision", "message", "pull_request")},
    "MergeOptions": {SAVING: ("max_shard_size",)},
    "CombineOptions": {SAVING: ("max_shard_size",)},
    "ConvertOptions": {SAVING: ("max_shard_size",)},
}
"""Class of the options -> heading -> fields, in the order in which they are shown."""

METAVARS: Mapping[str, str] = {
    "alpha_pattern": "TARGET=X,...",
    "data": "FILE|ORG/NAME",
    "data_weights": "X,X,...",
    "device": "DEVICE",
    "eval_data": "FILE|ORG/NAME",
    "eval_split": "SPLIT",
    "image_dir": "DIR",
    "init": "INIT",
    "label_field": "FIELD",
    "layout": "LAYOUT",
    "max_shard_size": "SIZE",
    "message": "TEXT",
    "method": "METHOD",
    "nuclear_ratio": "all|N",
    "prompt_field": "FIELD",
    "rank_pattern": "TARGET=N,...",
    "response_field": "FIELD",
    "revision": "BRANCH",
    "set": "NAME=VALUE,...",
    "split": "SPLIT",
    "targets": "TARGET,...",
    "text_fields": "FIELD[,FIELD]",
    "track": "NAME,...",
    "track_dir": "DIR",
    "train_also": "norms|biases|GLOB,...",
    "weights": "X,X,...",
}
"""Field -> what its value is called, if its type (N, X, TEXT or the choices) says too little."""


def headings(kind: type) -> Mapping[str, str]:
    """Field -> heading, for the options of a class, in the order of `--help`."""
    groups = _GROUPS.get(kind.__name__, {})
    return {field: heading for heading, names in groups.items() for field in names}
