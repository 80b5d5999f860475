"""Foreign text in a card stays text: in a table, in a block of code, and in Python that a reader runs."""

import ast
import re

import pytest

from svdconvert.manifest.training import Sample, Training
from svdconvert.publish.card_text import block, cell, literal
from svdconvert.publish.card_training import (
    generation_code,
    loss_curve,
    prompt_lines,
    sample_blocks,
    training_rows,
)

TEXTS = [
    "plain",
    "two\nlines | and a bar",
    "```\n## Injected\n```",
    "````` five",
    "'single' and \"double\" \\' \\\\ {prompt}",
    '"""\nimport os; os.system("x")\n"""',
    "<script>alert(1)</script> &amp; [link](http://x) *b* _i_ `c`",
    "\x00\x1b[31m\u202e é 漢",
    "\\",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_literal_of_python_is_the_text(text: str) -> None:
    found = literal(text)
    assert ast.literal_eval(found) == text
    assert "\n" not in found and found.startswith('"')


@pytest.mark.parametrize("text", TEXTS)
def test_a_block_ends_at_its_own_fence_only(text: str) -> None:
    fence, *inner, end = block(text).split("\n")
    assert re.fullmatch("`{3,}", fence) and end == fence
    assert not any(line.lstrip().startswith(fence) for line in inner)


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_is_one_line_without_markup(text: str) -> None:
    found = cell(text)
    assert "\n" not in found and "<" not in found
    assert not re.search(r"(?<!\\)(\\\\)*[|*_`\[\]]", found)


def hostile(text: str) -> Training:
    """A training all of whose texts are `text`."""
    return Training(
        options={"data": text, "lr": 0.1, "schedule": text},
        steps=3,
        rank=2,
        prompt=text or None,
        losses=[(1, 3.0), (2, 2.0), (3, 1.0)],
        samples=[Sample(prompt=text, before=text, after=text)],
    )


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_of_a_training_leaves_its_place(text: str) -> None:
    training = hostile(text)
    assert not any("\n" in value or "<" in value for value in training_rows(training, "pissa").values())
    ast.parse(generation_code(training, '"me/x"'))
    for blocks in sample_blocks(training):
        assert {*blocks} == {"prompt", "before", "after"}
    assert "Injected" not in re.sub(r"^(`{3,})\n.*?^\1$", "", prompt_lines(training), flags=re.S | re.M)


def test_the_curve_has_one_character_per_point_and_both_ends() -> None:
    assert loss_curve(hostile("x")) == "loss      █▅▁  3.0000 to 1.0000"
    assert loss_curve(None) == "" and training_rows(None, "pissa") == {}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("chat", ["apply_chat_template", "add_generation_prompt=True"]),
        ("none", ["tokenizer(question"]),
        ("Q: {prompt}\nA:", ['template = "Q: {prompt}\\nA:"', 'template.replace("{prompt}", question)']),
    ],
)
def test_the_code_asks_in_the_form_of_the_training(prompt: str, words: list[str]) -> None:
    code = generation_code(Training(options={}, prompt=prompt), '"me/x", revision="r"')
    assert all(word in code for word in words)
    assert 'from_pretrained("me/x", revision="r")' in code
    assert generation_code(Training(options={}), '"me/x"') == ""
