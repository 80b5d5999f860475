"""What a model card tells of a training: data, options, losses with their curve, prompt and samples."""

from collections.abc import Iterator
from typing import Any

from svdconvert.manifest.training import CHAT, NO_TEMPLATE, Point, Training
from svdconvert.output.sparkline import sparkline
from svdconvert.publish.card_text import block, cell, literal

_SHOWN = {
    "split": "split",
    "lr": "learning rate",
    "schedule": "schedule",
    "batch_size": "batch size",
    "accumulate": "batches per step",
    "max_length": "longest row in tokens",
    "seed": "seed",
}
"""Option of train -> how the card calls it."""
_LONGEST = 600  # characters of a sample


def training_rows(training: Training | None, method: str) -> dict[str, str]:
    """The facts of a training, as rows of a table."""
    if training is None:
        return {}
    rows = {
        "data": ", ".join(training.data),
        "steps": str(training.steps or ""),
        "trained": "all weights" if training.rank is None else f"{method}, rank {training.rank}",
        **{name: str(training.options.get(key, "")) for key, name in _SHOWN.items()},
        "loss": _change(training.losses),
        "held-out loss": _change(training.held_out),
    }
    return {name: cell(value) for name, value in rows.items() if value not in ("", "None")}


def _change(points: "tuple[Point, ...] | Any") -> str:
    return f"{points[0][1]:.4f} to {points[-1][1]:.4f}" if points else ""


def loss_curve(training: Training | None) -> str:
    """The losses as lines of block characters; empty if there are less than three.

    Text, because it is the same in every viewer of the card, on the Hub and off it, and needs no file and no
    package.
    """
    curves = {"loss": training.losses, "held-out": training.held_out} if training else {}
    lines = [
        f"{name:9} {sparkline([value for _, value in points])}  {points[0][1]:.4f} to {points[-1][1]:.4f}"
        for name, points in curves.items()
        if len(points) > 2
    ]
    return "\n".join(lines)


def prompt_lines(training: Training | None) -> str:
    """How the model is asked, for a reader; empty if that is not known."""
    if training is None or training.prompt in (None, NO_TEMPLATE):
        return ""
    if training.prompt == CHAT:
        return "It was trained on chats in the form of the tokenizer's chat template."
    return (
        "It was trained on this prompt, with the question in place of `{prompt}`; other prompts give worse "
        f"answers.\n\n{block(str(training.prompt))}"
    )


def generation_code(training: Training | None, tokenizer: str) -> str:
    """Python that asks `model` one question in the form that it was trained on; empty if that is not known.

    `tokenizer` is the repository of the tokenizer, as the arguments of from_pretrained.
    """
    if training is None or training.prompt is None:
        return ""
    return "\n".join(
        [
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
            'question = "What is 3 + 4 ?"',
            *_inputs(training.prompt),
            "answer = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _inputs(prompt: str) -> list[str]:
    if prompt == CHAT:
        return [
            "inputs = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": question}],',
            "    add_generation_prompt=True,",
            "    return_dict=True,",
            '    return_tensors="pt",',
            ")",
        ]
    if prompt == NO_TEMPLATE:
        return ['inputs = tokenizer(question, return_tensors="pt")']
    return [
        f"template = {literal(prompt)}",
        'inputs = tokenizer(template.replace("{prompt}", question), return_tensors="pt")',
    ]


def sample_blocks(training: Training | None) -> Iterator[dict[str, str]]:
    """{"prompt": .., "before": .., "after": ..} of every sample, as blocks of code."""
    for sample in training.samples if training else ():
        texts = {"prompt": sample.prompt, "before": sample.before, "after": sample.after}
        yield {name: block(_shortened(text) or "(no text)") for name, text in texts.items()}


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
