"""The journal of a staging directory: what is finished, so that the same command can continue after a kill.

Each rank writes a JSON-lines file: first the run's identity (command, options, source, version), then one
line for each finished item, written after the item's bytes, and one for each sync of a file. Every line has a
checksum. After a kill all complete lines are true. After a power cut the bytes of an item may be missing
although its line is there: `unsynced` names the items to check. The open file is locked, so that two runs
cannot write one directory.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any

import xxhash

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.errors import OutputError

Record = dict[str, Any]
_LONGEST_FIRST_LINE = 1 << 20
_BEGIN = b'{"checksum": "'
"""How every line of a journal begins."""


class Journal:
    """The finished items of one run, with a record of each."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, discard: bool = False) -> None:
        """Open or create the journal at `path`; `discard` removes what it holds.

        Raises OutputError if another process has it open, or if it belongs to a run with another identity
        (the message names what differs).
        """
        self.resumed = False
        """True if an earlier run with the same identity wrote this journal."""
        self.finished: dict[str, Record] = {}
        self.unsynced: set[str] = set()
        """Items of an earlier run whose bytes were not known to be on the disk when they were recorded."""
        self._lock = Lock()
        self._stream = path.open("ab+")
        try:
            _lock(self._stream, path.parent)
            lines, end = ([], 0) if discard else _complete_lines(self._stream)
            if lines:
                require_same_run(lines[0], json.loads(json.dumps(identity)), path.parent)
            self.finished, self.unsynced = _items(lines)
            self._count = len(lines)
            self._stream.truncate(end)
            self._identity = identity
            self.resumed = bool(lines)
            if not lines:
                self._append(identity)
        except BaseException:
            self._stream.close()
            raise

    def finish(self, item: str, record: Record) -> None:
        """Record that all bytes of `item` are written."""
        self._append({"item": item, "record": record})
        self.finished[item] = record

    def drop(self, item: str) -> None:
        """Forget an item whose bytes are not there."""
        del self.finished[item]

    def begin_sync(self) -> int:
        """The position of the journal before a file is synced, for `end_sync`."""
        return self._count

    def end_sync(self, file: str, position: int) -> None:
        """Record that a file was synced after everything before `position` was written."""
        self._append({"synced": file, "before": position})

    def clear(self) -> None:
        """Remove all finished items, as if this run were the first."""
        self._stream.truncate(0)
        self.finished.clear()
        self.unsynced.clear()
        self._count = 0
        self.resumed = False
        self._append(self._identity)

    def sync(self) -> None:
        """Wait until the journal is on the disk, if it is open. Raises OSError."""
        if not self._stream.closed:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the journal and release the lock."""
        self._stream.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps({"checksum": _checksum(line), "line": line}).encode()
        with self._lock:
            self._stream.write(text + b"\n")
            self._stream.flush()
            self._count += 1


def is_own_journal(path: Path) -> bool:
    """True if a journal of svdconvert is at `path`, or one whose first line a kill has cut short."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        if _complete_lines(stream)[0]:
            return True
        stream.seek(0)
        start = stream.read(_LONGEST_FIRST_LINE)
    return b"\n" not in start and start[: len(_BEGIN)] == _BEGIN[: len(start)]


def journals(directory: Path) -> list[Path]:
    """The journals of all ranks in a staging directory."""
    return sorted(directory.glob("journal*.jsonl"))


def other_journals(directory: Path) -> list[Path]:
    """Those of all ranks but the leading one."""
    return [path for path in journals(directory) if path.name != "journal.jsonl"]


def read_journal(path: Path) -> tuple[Mapping[str, Any], dict[str, Record]]:
    """(identity, item -> record) of a journal; both are empty if there is none."""
    if not path.exists():
        return {}, {}
    with path.open("rb") as stream:
        lines, _ = _complete_lines(stream)
    return (lines[0] if lines else {}), _items(lines)[0]


def _lock(stream: IO[bytes], directory: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"another run is writing {directory}; wait until it ends, or choose another -o"
        ) from error


def _complete_lines(stream: IO[bytes]) -> tuple[list[Any], int]:
    """The parsed lines before the first incomplete one, and the offset at which they end."""
    stream.seek(0)
    lines: list[Any] = []
    end = 0
    for text in stream:
        try:
            entry = parse_json(text if text.endswith(b"\n") else b"")
            line = entry["line"]
            if entry["checksum"] != _checksum(line) or not _is_ours(line, first=not lines):
                break
            lines.append(line)
        except (ValueError, KeyError, TypeError):
            break
        end += len(text)
    return lines, end


def _is_ours(line: Any, *, first: bool) -> bool:
    """True for what this class writes: an identity as the first line, then items and syncs."""
    if not isinstance(line, dict) or first:
        return isinstance(line, dict)
    if "synced" in line:
        return isinstance(line["synced"], str) and type(line.get("before")) is int
    record = line.get("record")
    files = record.get("files", {}) if isinstance(record, dict) else None
    return (
        isinstance(line.get("item"), str)
        and isinstance(files, dict)
        and all(isinstance(checksums, dict) for checksums in files.values())
    )


def _items(lines: Sequence[Any]) -> tuple[dict[str, Record], set[str]]:
    """(item -> record, the items that no sync followed) of a journal's lines."""
    finished: dict[str, Record] = {}
    places: dict[str, int] = {}
    synced: dict[str, int] = {}
    for place, line in enumerate(lines[1:], 1):
        if "synced" in line:
            synced[line["synced"]] = max(line["before"], synced.get(line["synced"], 0))
        else:
            finished[line["item"]] = line["record"]
            places[line["item"]] = place
    unsynced = {
        item
        for item, record in finished.items()
        if any(synced.get(file, 0) <= places[item] for file in record.get("files", {}))
    }
    return finished, unsynced


def _checksum(line: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(line).encode()))


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raise OutputError if the identity in the journal is not the present run's."""
    was = _flat(before)
    is_ = _flat(now)
    if differing := sorted(key for key in {*was, *is_} if was.get(key) != is_.get(key)):
        # If an option has changed, the other differences may follow from it.
        options = [key for key in differing if key.startswith(("options.", "split."))]
        files = [key for key in differing if ".files." in key or ".start." in key]
        if files and not options:
            name = files[0].split(".", 2)[-1]
            raise OutputError(
                f"{name} has changed since {directory} was begun; restore it, or start again with --overwrite"
            )
        changes = ", ".join(
            f"{key} was {_brief(was.get(key))} and is {_brief(is_.get(key))}"
            for key in (options or differing)[:3]
        )
        raise OutputError(
            f"{directory} was left by another run: {changes}; repeat that run's command to continue it, "
            "or give --overwrite to start again"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"options": {"rank": 1}} -> {"options.rank": 1}, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
