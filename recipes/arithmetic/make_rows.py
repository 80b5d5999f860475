"""Sums of three or four numbers with worked solutions, from reasoning-gym, as training and held-out rows.

    pip install reasoning-gym==0.1.25
    python recipes/arithmetic/make_rows.py svdconvert/recipes/arithmetic

Writes OUT/train.jsonl and OUT/heldout.jsonl. The questions and answers are those of reasoning-gym's chain_sum
(Apache-2.0), with fixed seeds, as far as they only add; the solution, one addition per line, is worked out
here. No held-out question is among the training rows.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

TRAIN = 1024
HELD_OUT = 200
DRAWN = 10  # problems per row: most of them subtract too
Row = dict[str, str]


def main(out: Path) -> None:
    """Write both files."""
    held_out = list(first(HELD_OUT, rows(seed=2, size=DRAWN * HELD_OUT), without=set()))
    asked = {row["question"] for row in held_out}
    write(out / "heldout.jsonl", held_out)
    write(out / "train.jsonl", list(first(TRAIN, rows(seed=1, size=DRAWN * TRAIN), without=asked)))


def rows(seed: int, size: int) -> Iterator[Row]:
    """Questions with worked solutions."""
    from reasoning_gym import create_dataset

    problems = create_dataset(
        "chain_sum", min_terms=3, max_terms=4, min_digits=2, max_digits=2, seed=seed, size=size
    )
    for problem in problems:
        expression = problem["metadata"]["expression"]
        if "-" in expression:
            continue
        answer = worked(expression)
        assert answer.endswith(f"#### {problem['answer']}"), problem
        yield {"question": problem["question"], "answer": answer}


def worked(expression: str) -> str:
    """ "4 + 7 + 2" as "4 + 7 = 11", "11 + 2 = 13" and "#### 13" on three lines."""
    total, *terms = map(int, expression.split(" + "))
    lines = []
    for term in terms:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return "\n".join([*lines, f"#### {total}"])


def first(count: int, found: Iterator[Row], without: set[str]) -> Iterator[Row]:
    """The first `count` rows whose question neither came before nor is in `without`."""
    seen = set(without)
    for row in found:
        if len(seen) - len(without) == count:
            return
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row


def write(path: Path, found: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/arithmetic/make_rows.py OUT")
    main(Path(sys.argv[1]))
