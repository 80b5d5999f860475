"""How an adapter is trained, and what is kept of the way."""

from dataclasses import asdict, replace
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.options import Names

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

TRACKERS = ("tensorboard", "trackio", "wandb")

NOT_IN_THE_RESULT = ("save_every", "save_limit", "keep_checkpoints", "track", "track_dir")
"""The options that make no difference to what is trained: they may change when a run goes on."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TrainOptions:
    """The `train` section of a recipe. A value out of range raises pydantic's ValidationError."""

    data: str | None = None
    """What is trained on: a .jsonl, .json, .parquet or .csv file, or a Hub data set ORG/NAME[:CONFIG]."""
    eval_data: str | None = None
    """What the held-out loss is measured on, found like `data`."""
    eval_rows: Count = 0
    """Hold out the last N rows of `data`, where there is no `eval_data`."""
    split: str = "train"
    """Split of a Hub data set. A slice such as train[:1000] cuts files too."""
    task: Literal["text", "classify", "regress"] = "text"
    """What is learnt: the next token of texts, or a label or a number for every row, with a head on top."""
    text_fields: str | None = None
    """Fields of the text, or of the two texts by a comma, of a row with a label; GLUE's are known."""
    label_field: str = "label"
    """Field of the label."""
    eval_split: str | None = None
    """Split of `eval_data`, where it is another one than `split`."""
    prompt_field: str | None = None
    """Name of the prompt's field, where it is not one of the known ones."""
    response_field: str | None = None
    """Name of the response's field, where it is not one of the known ones."""
    template: str | None = None
    """What is put around a prompt: a text with {prompt} in it, "chat" for the tokenizer's own, or "none"."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a row."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What becomes of a longer row: its end is cut off, it is left out, or the run is refused."""
    packing: bool = False
    """Put several rows into one of up to max_length tokens; they do not see each other."""
    prompt_loss: bool = False
    """Learn the prompts too, not the responses alone."""
    ending: str = ""
    """Text behind every response, before the end-of-sequence token."""

    lr: Rate | None = None
    """Highest learning rate; the method's own where it is not given."""
    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Rate | None = None
    """Passes over the data, in place of `steps`; one where neither is given."""
    batch_size: Positive = 4
    """Rows in one forward pass of one process."""
    accumulate: Positive = 1
    """Forward passes of one process in one step."""
    warmup: Share = 0.03
    """Share of the steps in which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on after the warm-up."""
    weight_decay: Weight = 0.0
    """AdamW's weight decay."""
    clip: Weight = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    dropout: Share = 0.0
    """Dropout before the adapter; the model's own is off."""

    train_also: Names | None = None
    """What is trained whole beside the adapter: norms, biases, or globs on names of tensors; by commas."""
    penalty: Weight | None = None
    """Weight of the penalty that keeps SORSA's U and V orthonormal; the method's own where not given."""
    penalty_rule: Literal["weight", "reference"] = "weight"
    """reference divides it (4e-4 where not given) by lr and accumulate, as SORSA's script does in effect."""
    corrected_gradient: bool = False
    """LoRA-FA's second version: B's gradient is the least-squares one for the whole matrix."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 or fp16 autocast, or none; auto takes bf16 where the device is fast at it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    device: str = "auto"
    """auto, cpu, or a device of torch's such as cuda or cuda:1."""
    eval_every: Positive | None = None
    """Steps from one held-out loss to the next; the first and the last are measured in any case."""
    patience: Positive | None = None
    """Stop when the held-out loss was not the least for N measurements."""
    keep_best: bool = False
    """Write the adapter of the least held-out loss, not that of the last step."""
    samples: Count = 0
    """Let the model answer the first N held-out prompts at every measurement, into samples.jsonl."""
    sample_tokens: Positive = 64
    """Most tokens of such an answer."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the rows and of dropout."""

    save_every: Positive = 50
    """Steps from one checkpoint to the next, from which an interrupted run goes on."""
    save_limit: Positive = 2
    """How many checkpoints are kept, of the newest."""
    keep_checkpoints: bool = False
    """Leave the checkpoints in the output's folder checkpoints."""
    track: str | None = None
    """Send the metrics to tensorboard, wandb or trackio, by commas."""
    track_dir: str = "runs"
    """Where tensorboard and wandb keep their files; trackio has a place of its own."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs exclude each other: give one")
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field belong together: give both")
        if self.template not in (None, "chat", "none") and "{prompt}" not in str(self.template):
            raise ValueError('template is a text with {prompt} in it, "chat" or "none"')
        if (self.patience or self.keep_best or self.samples) and not (self.eval_data or self.eval_rows):
            raise ValueError(
                "patience, keep_best and samples want held-out rows: give eval_rows or eval_data"
            )
        if self.task != "text" and (self.packing or self.samples or self.prompt_loss):
            raise ValueError(f"packing, samples and prompt_loss are for texts, not for task {self.task}")
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            raise ValueError(f"track knows {', '.join(TRACKERS)}, not {unknown[0]}")
        return self

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `track`."""
        return tuple(name.strip() for name in (self.track or "").split(",") if name.strip())

    def with_rate(self, rate: float) -> "TrainOptions":
        """This plan with the learning rate `rate`, unless it has one of its own."""
        return self if self.lr is not None else replace(self, lr=rate)

    def shaping(self) -> dict[str, Any]:
        """The options that shape the result, by name."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_THE_RESULT}

    def steps_per_epoch(self, rows: int, processes: int = 1) -> int:
        """Steps in which `processes` processes see `rows` rows once; the last may be a smaller one."""
        return ceil(rows / (self.batch_size * self.accumulate * processes))

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Optimizer steps of the whole run on `rows` rows."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return ceil(epochs * self.steps_per_epoch(rows, processes))


TrainPlan = TrainOptions
"""The name of `TrainOptions` up to version 0.1."""
