"""Classes of transformers that put a head for a task on the body of a model."""

_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


def class_with_head(model_type: object, task: str | None) -> str | None:
    """The class for a model type and PEFT's name of a task; None if transformers has none."""
    if task not in _MAPPINGS or not isinstance(model_type, str):
        return None
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, _MAPPINGS[task]).get(model_type)
    return found if isinstance(found, str) else None
