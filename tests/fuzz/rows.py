"""Targets of training data: rows as they are encoded, and files of rows as `datasets` reads them."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.labelled import LabelledRowEncoder
from svdconvert.training.data.rows import has_values, read_rows, row_text
from tests.fuzz.mutate import change_bytes, change_json, change_lines, change_text
from tests.fuzz.target import Target, put
from tests.reading import write_tokenizer

_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)


def _build() -> Any:
    """A tokenizer of words with a chat template; made before an input is read, which may not write."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


_TOKENIZER = _build()


def _rows_of(raw: bytes) -> list[dict[str, Any]]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError):
        return []
    return [row] if isinstance(row, dict) and row else []


def _read_row(raw: bytes, directory: Path) -> None:
    """A row of text or of a chat."""
    for template in (None, "chat", "none"):
        for row in _rows_of(raw):
            row_text(row)
            has_values(row)
            (example,) = TextRowEncoder(_TOKENIZER, TrainOptions(template=template, max_length=64))([row])
            assert example is None or len(example.input_ids) <= 64


def _read_labelled_row(raw: bytes, directory: Path) -> None:
    """A row with a class or a number."""
    for row in _rows_of(raw):
        classes = LabelledRowEncoder(_TOKENIZER, TrainOptions(task="classify"))
        assert classes([row])[0] is not None and classes.labels
        numbers = LabelledRowEncoder(_TOKENIZER, TrainOptions(task="regress"))
        (example,) = numbers([row])
        assert example is not None and bool(example.labels.isfinite())


def _read_file(raw: bytes, directory: Path) -> None:
    """A file of rows; JSON lines are read as json reads them, up to what Arrow makes equal in all rows."""
    rows = list(read_rows(str(put(raw, directory))))
    assert rows and all(isinstance(row, dict) for row in rows)
    for row in rows:
        row_text(row)


def _change_file(chance: Any, raw: bytes) -> bytes:
    name, _, content = raw.partition(b"\n")
    change = {
        b"rows.jsonl": change_lines,
        b"rows.json": change_json,
        b"rows.parquet": change_bytes,
    }.get(name, change_text([",", '"', "\t", "\r", "\0", '""', "a,b,c,d", "\ufeff", ","]))
    return name + b"\n" + change(chance, content)


def _parquet() -> bytes:
    stream = io.BytesIO()
    table = pyarrow.table({"question": ["1 + 1", "2"], "answer": ["2", None], "n": [[1], [2, 3]]})
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


def _encoded(*rows: Any) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


_TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1 + 1 = ?"},
    {"role": "assistant", "content": "2", "weight": 1},
]
_SHARED = [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2", "train": True}]
_TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
_ROWS = _encoded(
    {"question": "1 + 1", "answer": "2"},
    {"instruction": "add", "input": "1 1", "output": "2"},
    {"prompt": "1 +", "completion": " 1"},
    {"text": "1 + 1 = 2"},
    {"messages": _TURNS, "tools": _TOOLS},
    {"messages": _TURNS[1:], "system": "be kind", "tools": json.dumps(_TOOLS)},
    {"conversations": _SHARED, "system": "be brief"},
)
_LABELLED = _encoded(
    {"sentence1": "1", "sentence2": "2", "label": 1},
    {"text": "1 + 1", "label": "yes"},
    {"sentence": "1", "label": 0.5},
)
_FILES = [
    b"rows.jsonl\n" + b"\n".join(_ROWS[:2]) + b"\n" + _ROWS[0] + b"\n",
    b"rows.json\n[" + b",".join([_ROWS[0]] * 2) + b"]",
    b'rows.csv\nquestion,answer\n1 + 1,2\n"a, b",""\n',
    b'rows.tsv\nsentence\tlabel\n1 + 1\t0\n"2\t1\n',
    b"rows.parquet\n" + _parquet(),
]

TARGETS = {
    "row": Target(_read_row, share=8, seeds=_ROWS),
    "labelled-row": Target(_read_labelled_row, share=8, seeds=_LABELLED),
    "data-file": Target(_read_file, _change_file, share=1, seeds=_FILES),
}
