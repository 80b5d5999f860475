"""Everything that a run trains on: read, encoded, split into training and held-out examples, and packed."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xxhash import xxh3_64

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.layouts.base import Layout
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import Example, padding_id
from svdconvert.training.data.labelled import LabelledRowEncoder
from svdconvert.training.data.mixing import mix_examples, mixture_counts
from svdconvert.training.data.packing import pack_examples
from svdconvert.training.data.rows import (
    Row,
    has_values,
    read_rows,
    refuse_split_of_files,
    require_rows,
    row_text,
)
from svdconvert.training.model.load import has_processor, load_processor, load_tokenizer
from svdconvert.training.optim.heads import SequenceLabel, require_scores
from svdconvert.training.optim.objective import NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodedRows = Sequence[Example | None]
"""One entry per row; None for a row without a token in the loss."""


class Encoder(Protocol):
    """Makes examples of rows."""

    @property
    def used_fields(self) -> Collection[str]:
        """The fields of the rows encoded last that influence the result."""

    @property
    def unused_keys(self) -> Collection[str]:
        """The keys of messages in the rows encoded last that the chat template did not use."""

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences about how rows are encoded, each once."""

    def __call__(self, rows: Iterable[Row], folder: Path | None = None) -> EncodedRows:
        """One entry per row; `folder` is that of the images that rows name.

        Raises DataError, which names the row, if a row cannot be used.
        """


@dataclass(slots=True)
class RowCounts:
    """The rows of all data sets together, training and held-out ones, before packing."""

    read: int = 0
    cut: int = 0
    """Rows that are longer than `max_length` and are cut."""
    left_out: int = 0
    """Rows that are too long, or without a token in the loss."""
    longest: int = 0
    """Tokens of the longest row before it is cut."""

    def add(self, rows: EncodedRows, options: TrainOptions) -> None:
        """Count the rows of a data set."""
        known = [row for row in rows if row is not None]
        long = sum(map(_is_truncated, known))
        drops_long = options.too_long == "drop"
        self.read += len(rows)
        self.cut += 0 if drops_long else long
        self.left_out += len(rows) - len(known) + (long if drops_long else 0)
        self.longest = max(self.longest, *(row.length for row in known), 0)


@dataclass(frozen=True, slots=True)
class DataSplits:
    """The examples of a run."""

    train: Sequence[Example]
    held_out: Sequence[Example] = ()
    warnings: Sequence[str] = ()
    """One sentence for each kind of row that is truncated or left out."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Name of the data -> checksum of all its rows as read."""
    counts: RowCounts = field(default_factory=RowCounts)

    @property
    def all(self) -> Sequence[Example]:
        """The training and the held-out examples."""
        return (*self.train, *self.held_out)

    @property
    def has_images(self) -> bool:
        """True if there are rows with images."""
        return any(example.images is not None for example in self.all)

    def checksum(self) -> str:
        """A checksum of all examples: the same rows give others with another tokenizer or chat template."""
        total = xxh3_64()
        for example in self.all:
            total.update(repr((len(example.input_ids), example.starts)).encode())
            for tensor in (example.input_ids, example.labels, example.token_types):
                if tensor is not None:
                    total.update(tensor.contiguous().numpy().tobytes())
            if example.images is not None:
                total.update(example.images.checksum.encode())
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run with the tokenizer and the objective that belong to them."""

    tokenizer: "PreTrainedTokenizerBase"
    splits: DataSplits
    objective: NextToken | SequenceLabel
    labels: Sequence[str] | None = None
    """Names of the classes of a new head, empty for regression; None if the model keeps its own head."""
    prompt_format: str | None = None
    """How the trained model is asked: a template, chat or none; None for rows with labels or images."""

    def padded_below(self, rows: float) -> "TrainingData":
        """The same with a padding token below `rows`, the number of rows of the embedding.

        Tokenizers often get a padding token that the model does not have. As nothing attends to padding, 0
        serves as well.
        """
        if self.objective.pad_id < rows:
            return self
        return replace(self, objective=replace(self.objective, pad_id=0))


def open_training_data(
    weights: Path, layout: Layout, options: TrainOptions, *, trust_remote_code: bool = False
) -> TrainingData:
    """Read and encode all data that the options name, with the tokenizer of the model at `weights`.

    Raises DataError if data cannot be used, CheckpointError if there is no tokenizer, MissingPackageError if
    the scores of a classifier or regressor need a package that is not installed.
    """
    tokenizer = load_tokenizer(weights, layout, trust_remote_code=trust_remote_code)
    if options.task != "text":
        require_scores()
        labelled = LabelledRowEncoder(tokenizer, options)
        splits = read_dataset(options, labelled)
        objective = SequenceLabel(padding_id(tokenizer), len(labelled.labels))
        return TrainingData(tokenizer, splits, objective, labelled.labels)
    load_vision = partial(load_processor, weights, trust_remote_code=trust_remote_code)
    encoder = TextRowEncoder(tokenizer, options, load_vision if has_processor(weights) else None)
    splits = read_dataset(options, encoder)
    _refuse_idle_image_dir(splits, options)
    vision = encoder.vision if splits.has_images else None
    next_token = NextToken(padding_id(tokenizer), vision)
    return TrainingData(tokenizer, splits, next_token, prompt_format=encoder.prompt_format)


def _refuse_idle_image_dir(splits: DataSplits, options: TrainOptions) -> None:
    if options.image_dir is None:
        return
    named = (image for row in splits.all for image in (row.images.images if row.images else ()))
    if all(image.path is None for image in named):
        raise DataError("`image_dir` changes nothing: no row names an image by its path; leave it out")


def require_data(options: TrainOptions) -> None:
    """Raise DataError if there is nothing to train on, or a file is absent, before anything is read."""
    if not options.data_sets:
        raise DataError("there is nothing to train on: give `data` a file or a Hub data set")
    for data in (*options.data_sets, *([] if options.eval_data is None else [options.eval_data])):
        require_rows(data)
    _refuse_splits_of_files(options)


def read_dataset(options: TrainOptions, encoder: Encoder) -> DataSplits:
    """Read and encode all data that the options name. Raises DataError if something cannot be used."""
    require_data(options)
    reader = _Reader(options, encoder)
    sets: list[list[Example]] = []
    held_out: list[Example] = []
    for data in options.data_sets:
        rows = reader.read(data, options.split)
        if options.eval_data is None and options.eval_rows:
            count = _rows_to_train_on(rows, data, options)
            held_out += _usable_examples(rows[count:], data, "held-out", options)
            rows = rows[:count]
        sets.append(_usable_examples(rows, data, "training", options))
    if options.eval_data is not None:
        rows = reader.read(options.eval_data, options.eval_split or options.split)
        held_out = _usable_examples(rows, options.eval_data, "held-out", options)
    train = mix_examples(sets, options.data_weights, options.seed)
    if options.data_weights is not None:
        reader.warnings.append(_mixture_text(sets, options))
    if options.packing:
        if any(example.images is not None for example in train):
            raise DataError("`packing` is for rows without images; leave it out")
        train = pack_examples(train, options.max_length)
    warnings = [*encoder.remarks, *reader.warnings]
    return DataSplits(train, held_out, warnings, reader.checksums, reader.counts)


def _refuse_splits_of_files(options: TrainOptions) -> None:
    evaluated = [] if options.eval_data is None else [options.eval_data]
    if options.eval_split is not None:
        refuse_split_of_files("--eval-split", options.eval_split, evaluated)
        evaluated = []
    refuse_split_of_files("--split", options.split, [*options.data_sets, *evaluated])


def _rows_to_train_on(rows: EncodedRows, data: str, options: TrainOptions) -> int:
    """The number of rows that are not held out. Raises DataError if there are none."""
    count = len(rows) - options.eval_rows
    if count <= 0:
        raise DataError(
            f"{data}: `eval_rows` holds out {options.eval_rows} of its {len(rows)} rows, which leaves none "
            "to train on; give fewer"
        )
    return count


def _mixture_text(sets: Sequence[Sequence[Example]], options: TrainOptions) -> str:
    """What one pass over a mixture takes from each data set."""
    counts = mixture_counts([len(rows) for rows in sets], options.data_weights or ())
    parts = [
        f"{count} rows of {data} (it has {len(rows)})"
        for data, rows, count in zip(options.data_sets, sets, counts, strict=True)
    ]
    return f"one pass over the mixture takes {' and '.join(parts)}"


@dataclass(frozen=True)
class _Reader:
    """Reads and encodes data sets, and records what there is to say about each."""

    options: TrainOptions
    encoder: Encoder
    warnings: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    counts: RowCounts = field(default_factory=RowCounts)

    def read(self, data: str, split: str) -> EncodedRows:
        """Read and encode one data set."""
        rows = read_rows(data, split)
        checksum = xxh3_64()
        fields: dict[str, None] = {}

        def observed_rows() -> Iterator[Row]:
            for row in rows:
                checksum.update(row_text(row).encode())
                fields.update(dict.fromkeys(has_values(row)))
                yield row

        try:
            encoded = self.encoder(observed_rows(), _image_folder(data, self.options))
            if self.options.too_long == "refuse":
                _refuse_long_rows(encoded, self.options.max_length)
        except DataError as error:
            raise DataError(f"{data}: {error}") from error
        self.checksums[f"{data} ({split})" if data in self.checksums else data] = checksum.hexdigest()
        self.counts.add(encoded, self.options)
        self.warnings.extend(_row_warnings(data, encoded, self.options))
        if unused := [name for name in fields if name not in self.encoder.used_fields]:
            used = ", ".join(name for name in fields if name in self.encoder.used_fields)
            self.warnings.append(f"{data}: of its fields only {used} are used, not {', '.join(unused)}")
        if keys := ", ".join(self.encoder.unused_keys):
            self.warnings.append(
                f"{data}: the chat template does not use {keys} in every message that has it"
            )
        return encoded


def _image_folder(data: str, options: TrainOptions) -> Path | None:
    """The folder that the paths of images in the rows of `data` are relative to; None for a Hub data set."""
    if options.image_dir is not None:
        return Path(options.image_dir)
    return Path(data).absolute().parent if Path(data).exists() else None


def _is_truncated(row: Example | None) -> bool:
    return row is not None and row.length > len(row.input_ids)


def _refuse_long_rows(rows: EncodedRows, max_length: int) -> None:
    for number, row in enumerate(rows, start=1):
        if row is None:
            reason = "has no token in the loss within"
        elif _is_truncated(row):
            reason = f"has {row.length} tokens, more than"
        else:
            continue
        raise DataError(
            f"row {number} {reason} `max_length` {max_length}: "
            "give a larger `max_length`, or set `too_long` to cut or drop"
        )


def _row_warnings(data: str, rows: EncodedRows, options: TrainOptions) -> Iterator[str]:
    truncated = [
        (number, row) for number, row in enumerate(rows, start=1) if row is not None and _is_truncated(row)
    ]
    if truncated:
        number, row = truncated[0]
        what = "left out" if options.too_long == "drop" else "cut"
        yield (
            f"{data}: {len(truncated)} of {len(rows)} rows are longer than `max_length` {options.max_length} "
            f"and are {what}; the first is row {number} with {row.length} tokens"
        )
    empty = [number for number, row in enumerate(rows, start=1) if row is None]
    if empty:
        yield (
            f"{data}: {len(empty)} of {len(rows)} rows are left out, because they have no token in the loss "
            f"within `max_length` {options.max_length}; the first is row {empty[0]}"
        )


def _usable_examples(rows: EncodedRows, data: str, part: str, options: TrainOptions) -> list[Example]:
    drops_long = options.too_long == "drop"
    usable = [row for row in rows if row is not None and not (drops_long and _is_truncated(row))]
    if not usable:
        raise DataError(
            f"{data}: none of the {len(rows)} {part} rows has a token in the loss within `max_length` "
            f"{options.max_length}: give a larger `max_length`, or answers that are not empty and have no "
            "weight 0"
        )
    return usable
