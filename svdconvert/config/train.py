"""The options of `train`."""

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from math import ceil, isclose, isfinite
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from svdconvert.config.options import Names


def _one_or_several(value: Any) -> Any:
    """A list of one name as that name."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("there is no name in it")
        return value[0] if len(value) == 1 else tuple(value)
    return value


def _as_shares(value: Any) -> Any:
    """ "7,3" as (0.7, 0.3)."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError("write it as NUMBER,NUMBER with one number for each data") from error
    if not numbers or not all(isfinite(number) and number > 0 for number in numbers):
        raise ValueError("every share must be a number above 0")
    total = sum(numbers)
    return tuple(numbers) if isclose(total, 1.0, rel_tol=1e-12) else tuple(one / total for one in numbers)


Data = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)]
Shares = Annotated[tuple[float, ...], BeforeValidator(_as_shares)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

TRACKERS = ("tensorboard", "trackio", "wandb")

REPEATED = frozenset({"data"})
"""The options that the command line accepts several times."""

_OF_TEXTS = ("prompt_field", "response_field", "template", "ending", "image_dir")

NOT_IN_THE_RESULT = ("save_every", "save_limit", "keep_checkpoints", "track", "track_dir")
"""The options that do not influence what is trained: they may change when a run is resumed."""


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class TrainOptions:
    """The `train` section of a recipe. An invalid value raises pydantic's ValidationError.

    The docstring of a field is also the help text of its command-line option.
    """

    data: Data | None = None
    """Training data: a .jsonl, .json, .parquet, .csv or .tsv file, or a Hub data set ORG/NAME[:CONFIG]; give
    the option several times to mix several."""
    data_weights: Shares | None = None
    """Share of each `data` in the rows, such as 0.7,0.3; without it every row of all of them counts alike."""
    eval_data: str | None = None
    """Held-out data for the evaluation loss, given like `data`."""
    eval_rows: Count = 0
    """Hold out the last N rows of each `data`, if there is no `eval_data`."""
    split: str = "train"
    """Split of a Hub data set. A slice such as train[:1000] applies to files too."""
    task: Literal["text", "classify", "regress"] = "text"
    """What is learned: the next token of texts, or a class or a number per row, with a new head."""
    text_fields: str | None = None
    """For classify and regress: field of the text, or of two texts by a comma; those of GLUE are known."""
    label_field: str = "label"
    """For classify and regress: the field of the label."""
    eval_split: str | None = None
    """Split of `eval_data`, if it differs from `split`."""
    image_dir: str | None = None
    """Folder that the images named in the rows are in; by default that of the data file."""
    prompt_field: str | None = None
    """Field of the prompt, if it is not one of the known ones."""
    response_field: str | None = None
    """Field of the response, if it is not one of the known ones."""
    template: str | None = None
    """Prompt template: text with {prompt} in it, "chat" (the tokenizer's) or "none"; by default Alpaca's."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Maximum number of tokens in a row."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What to do with longer rows: cut off the end, drop the row, or refuse the data."""
    packing: bool = False
    """Pack several rows into sequences of up to `max_length` tokens; rows do not attend to each other."""
    prompt_loss: bool = False
    """Include the prompts in the loss, not only the responses."""
    ending: str = ""
    """Text appended to every response, before the end-of-sequence token."""

    lr: Rate | None = None
    """Peak learning rate; by default the one published for the method."""
    steps: Positive | None = None
    """Number of optimizer steps."""
    epochs: Rate | None = None
    """Passes over the data, instead of `steps`; 1 if neither is given."""
    batch_size: Positive = 4
    """Rows per forward pass and process."""
    accumulate: Positive = 1
    """Forward passes per optimizer step and process."""
    warmup: Fraction = 0.03
    """Fraction of the steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    clip: Weight = 1.0
    """Maximum norm of the gradient; 0 disables clipping."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input; the model's own dropout is off."""

    train_also: Names | None = None
    """Train these in full, in addition to the adapter: norms, biases, or globs on tensor names, by commas."""
    penalty: Weight | None = None
    """Weight of SORSA's penalty, which keeps U and V orthonormal; by default the method's."""
    penalty_rule: Literal["weight", "reference"] = "weight"
    """reference: divide `penalty` (then 4e-4 by default) by `lr` and `accumulate`, as SORSA's script does."""
    corrected_gradient: bool = False
    """LoRA-FA's second version: B's gradient is the least-squares fit to that of the full matrix."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 or fp16 autocast, or fp32; auto chooses bf16 if the device is fast at it."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """Attention; auto: in blocks for up to 512 tokens in bf16 on a CPU, else the model's own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory."""
    device: str = "auto"
    """auto, cpu, or a device of torch such as cuda or cuda:1."""
    eval_every: Positive | None = None
    """Steps between two evaluations; the first and the last are always made."""
    patience: Positive | None = None
    """Stop after N evaluations without a new lowest held-out loss."""
    keep_best: bool = False
    """Write the weights with the lowest held-out loss instead of the last ones."""
    samples: Count = 0
    """Let the model answer the first N held-out prompts at every evaluation, into samples.jsonl."""
    sample_tokens: Positive = 64
    """Maximum number of tokens in such an answer."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the rows and of dropout."""

    save_every: Positive = 50
    """Steps between two checkpoints, from which an interrupted run is resumed."""
    save_limit: Positive = 2
    """How many of the newest checkpoints are kept."""
    keep_checkpoints: bool = False
    """Keep the checkpoints in the output's folder checkpoints."""
    track: str | None = None
    """Also send the metrics to tensorboard, wandb or trackio; comma-separated."""
    track_dir: str = "runs"
    """Folder for the files of tensorboard and wandb; trackio has a separate one."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` and `epochs` exclude each other: give one")
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("`prompt_field` and `response_field` belong together: give both")
        if self.template not in (None, "chat", "none") and "{prompt}" not in str(self.template):
            raise ValueError('`template` is a text with {prompt} in it, "chat" or "none"')
        if (self.patience or self.keep_best or self.samples) and not self.holds_out:
            raise ValueError(
                "`patience`, `keep_best` and `samples` need held-out rows: give `eval_rows` or `eval_data`"
            )
        if idle := next(self._idle_options(), None):
            raise ValueError("`{}` changes nothing {}; leave it out".format(*idle))
        if self.task != "text" and (self.packing or self.samples or self.prompt_loss):
            raise ValueError(
                f"`packing`, `samples` and `prompt_loss` are for texts, not for `task` {self.task}"
            )
        self._check_mixture()
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            raise ValueError(f"`track` knows {', '.join(TRACKERS)}, not {unknown[0]}")
        return self

    def _idle_options(self) -> Iterator[tuple[str, str]]:
        """(option, when it has no effect) for options that others make ineffective."""
        usual = {entry.name: entry.default for entry in fields(self)}
        for condition, needed, names in (
            ("without `eval_data`", self.eval_data is not None, ("eval_split",)),
            ("with `eval_data`, all of whose rows are held out", self.eval_data is None, ("eval_rows",)),
            ("without `samples`", self.samples > 0, ("sample_tokens",)),
            (
                "without tensorboard or wandb in `track`",
                {"tensorboard", "wandb"} & {*self.trackers},
                ("track_dir",),
            ),
            ("for `task` text", self.task != "text", ("text_fields", "label_field")),
            ("for another `task` than text", self.task == "text", _OF_TEXTS),
        ):
            if not needed:
                yield from ((name, condition) for name in names if getattr(self, name) != usual[name])

    @property
    def holds_out(self) -> bool:
        """True if there are held-out rows."""
        return self.eval_data is not None or self.eval_rows > 0

    def _check_mixture(self) -> None:
        if len(set(self.data_sets)) < len(self.data_sets):
            raise ValueError(
                "`data` has the same data set twice; give it once, and a larger share in `data_weights`"
            )
        if self.data_weights is None:
            return
        if len(self.data_sets) < 2:
            raise ValueError("`data_weights` mixes several data sets: give `data` several times")
        if len(self.data_weights) != len(self.data_sets):
            raise ValueError(
                f"`data_weights` has {len(self.data_weights)} numbers for {len(self.data_sets)} data sets; "
                "give one for each"
            )

    @property
    def data_sets(self) -> tuple[str, ...]:
        """The names in `data`."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data or ())

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `track`."""
        return tuple(name.strip() for name in (self.track or "").split(",") if name.strip())

    def with_default_lr(self, lr: float) -> "TrainOptions":
        """These options with the learning rate `lr`, unless they have one."""
        return self if self.lr is not None else replace(self, lr=lr)

    def shaping(self) -> dict[str, Any]:
        """Name -> value of the options that influence the result."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IN_THE_RESULT}

    def steps_per_epoch(self, rows: int, processes: int = 1) -> int:
        """Steps in which `processes` processes see each of `rows` rows once; the last may be smaller."""
        return ceil(rows / (self.batch_size * self.accumulate * processes))

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Optimizer steps of the entire run on `rows` rows."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return ceil(epochs * self.steps_per_epoch(rows, processes))


TrainPlan = TrainOptions
"""The name of `TrainOptions` up to version 0.1."""
