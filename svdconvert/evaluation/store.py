"""The files of an evaluation: answers as they are made, and the result when all are there.

While a task is answered, each rank appends to `<task>.partial*.jsonl`: first everything that shapes the
answers, then a line for every answer, and one at the end of every batch. A batch counts only with that line,
so a kill at any moment costs one batch at most. In the end `<task>.jsonl` and then `<task>.json` appear.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.config.ranks import Ranks
from svdconvert.errors import ArtifactError, OutputError
from svdconvert.evaluation.scores import Answered, Graded, of_line
from svdconvert.manifest.evaluations import FOLDER, EvaluationResult, read_evaluation, result_name
from svdconvert.output.journal import Journal, is_own_journal, read_journal, require_same_run
from svdconvert.output.ownership import sync_directory

Record = Mapping[str, Any]


def results_folder(model: str, output: Path | None) -> Path:
    """The directory of the results: in `output`, else in `model`. Nothing is created.

    Raises OutputError if `model` is not a local directory that can be written and there is no `output`.
    """
    if output is None and not Path(model).is_dir():
        raise OutputError(f"{model} is not a local directory; give a directory for the results with -o")
    folder = (output or Path(model)) / FOLDER
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(
            f"{folder} is no directory; move it away, or give a directory for the results with -o"
        )
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(present, os.W_OK):
        raise OutputError(f"{present} cannot be written; give a directory for the results with -o")
    return folder


@dataclass
class TaskFiles:
    """The files of one task in the directory of results."""

    folder: Path
    task: str
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def result(self) -> Path:
        """The result, which is written last."""
        return self.folder / f"{result_name(self.task)}.json"

    @property
    def answers(self) -> Path:
        """All answers with their grades, in the order of the rows."""
        return self.folder / f"{result_name(self.task)}.jsonl"

    def partial(self, rank: int) -> Path:
        """The answers of a rank until all are there."""
        ending = "" if rank == 0 else f"-{rank}"
        return self.folder / f"{result_name(self.task)}.partial{ending}.jsonl"

    def partials(self) -> list[Path]:
        """Those of all ranks, also of an earlier run with more of them."""
        return sorted(self.folder.glob(f"{result_name(self.task)}.partial*.jsonl"))

    def prepare(self, *, overwrite: bool) -> None:
        """Check whose the files are, and with `overwrite` remove what an earlier run left.

        Raises OutputError for a file that svdconvert did not write, ArtifactError for a damaged result.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.partials():
            if not is_own_journal(path):
                raise OutputError(f"{path} was not written by svdconvert; move it away")
        if self.result.exists():
            read_evaluation(self.result)
        elif self.answers.exists() and not self.partials():
            raise OutputError(f"{self.answers} has no {self.result.name} next to it; move it away")
        if overwrite:
            for path in (self.result, self.answers, *self.partials()):
                path.unlink(missing_ok=True)

    def finished(self, identity: Record) -> EvaluationResult | None:
        """The result, if it is there. Raises OutputError if it is that of another run."""
        if not self.result.exists():
            return None
        found = read_evaluation(self.result)
        require_same_run(identity_of(found), json.loads(json.dumps(identity)), self.result)
        return found

    def threads(self) -> int | None:
        """The number of threads that an unfinished run, or the result, was computed with."""
        if self.result.exists():
            options: Any = read_evaluation(self.result).options
        else:
            options = read_journal(self.partial(0))[0].get("options")
        found = options.get("threads") if isinstance(options, Mapping) else None
        return found if isinstance(found, int) and 0 < found < 1 << 16 else None

    def remove_partials(self) -> None:
        """Remove the answers that the result holds too."""
        for path in self.partials():
            path.unlink()

    def write(self, result: EvaluationResult, graded: Graded) -> None:
        """Write answers and result; the result appears last, so that it never lacks its answers."""
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in graded.lines)
        _replace(self.answers, lines)
        text = json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
        _replace(self.result, text + "\n")

    def read_answers(self) -> list[Answered]:
        """The answers of a finished evaluation. Raises ArtifactError if they are missing or damaged."""
        try:
            with self.answers.open("rb") as lines:
                return [of_line(parse_json(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ArtifactError(
                f"{self.answers} has no complete answers ({error}); evaluate again"
            ) from error


def identity_of(result: EvaluationResult) -> dict[str, Any]:
    """Everything that shaped the answers of a result; the name of the model did not."""
    values = result.model_dump(mode="json")
    model = {key: value for key, value in values["model"].items() if key != "name"}
    kept = ("task", "version", "data", "options", "versions")
    return {key: values[key] for key in kept} | {"model": model}


@dataclass
class Progressing:
    """The answers of one task while they are made."""

    files: TaskFiles
    identity: Record
    batches: Sequence[Sequence[str]]
    """The ids of the rows of every batch."""
    records: dict[str, Record] = field(default_factory=dict)
    """Item -> record of all complete batches, of all ranks."""
    _journal: Journal | None = None

    def open(self) -> list[int]:
        """Begin, or continue what an earlier run left; the numbers of this rank's batches that are missing.

        Raises OutputError if the files are of a run with another identity, or are being written.
        """
        ranks = self.files.ranks
        self._journal = Journal(self.files.partial(ranks.index), self.identity)
        ranks.wait()
        self._gather()
        ranks.wait()  # nobody appends before everybody has read
        missing = [number for number in range(len(self.batches)) if _end(number) not in self.records]
        return missing[ranks.index :: ranks.count]

    def _gather(self) -> None:
        """Read the complete batches of all ranks."""
        for path in self.files.partials():
            identity, items = read_journal(path)
            require_same_run(identity, json.loads(json.dumps(self.identity)), path)
            for number, rows in enumerate(self.batches):
                if _end(number) in items:
                    self.records |= {name: items[name] for name in (_end(number), *map(_row, rows))}

    def add(self, number: int, answers: Sequence[Record], seconds: float) -> None:
        """Record the answers to a batch, and wait until they are on the disk."""
        assert self._journal is not None
        for row, answer in zip(self.batches[number], answers, strict=True):
            self._journal.finish(_row(row), dict(answer))
        self._journal.finish(_end(number), {"seconds": seconds})
        self._journal.sync()

    def complete(self) -> None:
        """Wait for all ranks, and read what they have answered."""
        assert self._journal is not None
        self._journal.close()
        self.files.ranks.wait()
        self._gather()

    def record(self, row: str) -> Record:
        """The answer to a row."""
        return self.records[_row(row)]

    @property
    def seconds(self) -> float:
        """The time spent on answering, over all runs and ranks."""
        return sum(float(self.records[_end(number)]["seconds"]) for number in range(len(self.batches)))

    def close(self) -> None:
        """Release the file."""
        if self._journal is not None:
            self._journal.close()


def _row(row: str) -> str:
    return f"row {row}"


def _end(number: int) -> str:
    return f"batch {number}"


@contextmanager
def progressing(
    files: TaskFiles, identity: Record, batches: Sequence[Sequence[str]]
) -> Iterator[Progressing]:
    """A `Progressing` that releases its file in the end."""
    found = Progressing(files, identity, batches)
    try:
        yield found
    finally:
        found.close()


def _replace(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written ({error.strerror}); make room, and repeat the command"
        ) from error
    sync_directory(path.parent)
