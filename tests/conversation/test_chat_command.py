"""`svdconvert chat` and `svdconvert.chat` with every kind of directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from svdconvert import (
    ChatOptions,
    ConvertOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    chat,
    convert,
    decompose,
    merge,
    to_lora,
    train,
)
from svdconvert.cli.app import app
from tests import rwkv6
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.reading import readable, write_sums
from tests.terminal import Session

RUN = Run(device="cpu", threads=1)
QUESTION = "1 + 2 ="
FEW = ChatOptions(max_new_tokens=6, dtype="float32")


@pytest.fixture(scope="module")
def here(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what was made of it, with changes that are large enough to be heard."""
    home = tmp_path_factory.mktemp("chat")
    base = readable(checkpoint("llama", dtype=torch.float32, tied=False), home / "base")
    data = str(write_sums(home / "rows.jsonl"))
    template = "{prompt} is"
    options = TrainOptions(data=data, steps=4, batch_size=4, lr=0.05, precision="fp32", template=template)
    for method in ("pissa", "sorsa"):
        decompose(base, home / method, SplitOptions(rank=4, method=method), RUN)
        train(home / method, home / f"{method}-trained", options, RUN)
    merge(home / "pissa-trained", home / "merged", MergeOptions(dtype="float32"), RUN)
    to_lora(home / "pissa-trained", home / "lora", run=RUN)
    merge(home / "sorsa-trained", home / "sorsa-merged", MergeOptions(dtype="float32"), RUN)
    return home


def by_transformers(directory: Path, text: str) -> str:
    """The greedy answer of stock transformers to a text as it is."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_plain_model_and_its_untrained_decomposition_answer_as_transformers_does(here: Path) -> None:
    wanted = by_transformers(here / "base", QUESTION)
    assert wanted
    for kind in ("base", "pissa", "sorsa"):
        assert chat(here / kind, [QUESTION], FEW, RUN) == [wanted]


@pytest.mark.parametrize(
    ("kind", "merged"),
    [
        ("pissa-trained", "merged"),
        ("lora", "merged"),
        ("merged", "merged"),
        ("sorsa-trained", "sorsa-merged"),
    ],
)
def test_what_was_trained_answers_as_its_merge_does_through_the_template_of_its_training(
    kind: str, merged: str, here: Path
) -> None:
    wanted = by_transformers(here / merged, f"{QUESTION} is")
    assert wanted != by_transformers(here / "base", f"{QUESTION} is")
    assert chat(here / kind, [QUESTION], FEW, RUN) == [wanted]
    plain = ChatOptions(max_new_tokens=6, dtype="float32", template="none")
    assert (
        chat(here / kind, [QUESTION, QUESTION], plain, RUN) == [by_transformers(here / merged, QUESTION)] * 2
    )


def test_an_rwkv_6_answers_by_our_own_network(tmp_path: Path) -> None:
    rwkv6.save(rwkv6.random_model(vocabulary=256), tmp_path / "rwkv.pth")
    convert(tmp_path / "rwkv.pth", tmp_path / "rwkv", ConvertOptions(layout="hf"), RUN)
    answer = chat(tmp_path / "rwkv", ["hello"], FEW, RUN)[0]
    assert answer == chat(tmp_path / "rwkv.pth", ["hello"], FEW, RUN)[0]
    decompose(tmp_path / "rwkv", tmp_path / "pissa", SplitOptions(rank=4), RUN)
    assert chat(tmp_path / "pissa", ["hello"], FEW, RUN) == [answer]


def test_on_the_command_line_the_answer_alone_is_printed(here: Path) -> None:
    words = ("chat", here / "base", "--max-new-tokens", 6)
    ended = succeeded(*words, "--prompt", QUESTION)
    assert ended.out == by_transformers(here / "base", QUESTION) + "\n"
    assert ended.err == ""
    piped = CliRunner().invoke(app, [str(word) for word in words], input=QUESTION + "\n")
    assert piped.stdout == ended.out


def test_what_cannot_be_asked_is_refused(here: Path) -> None:
    refused("chat", here / "base", "--prompt", "\udc80", words=["half of a character"])
    refused("chat", here / "base", "--prompt", " ", words=["empty"])
    refused("chat", here / "base", "--prompt", "x", "--template", "chat", words=["no chat template"])
    refused(
        "chat", here / "base", "--prompt", "x", "--base", here / "merged", words=["--base", "leave it out"]
    )
    refused("chat", here / "base", "--prompt", "x", "--top-p", 0.5, words=["--top-p", "--temperature"])
    refused("chat", here / "base", words=["no prompt"])


@pytest.mark.processes
def test_only_the_residual_of_the_adapter_is_asked_and_from_where_it_was_given(
    here: Path, tmp_path: Path
) -> None:
    words = ["--prompt", QUESTION, "--max-new-tokens", 6, "--dtype", "float32"]
    moved = shutil.copytree(here / "pissa-trained", tmp_path / "trained")
    text = (moved / "svdconvert.json").read_text()
    for name in ("pissa", "base"):
        text = text.replace(json.dumps(str(here / name)), json.dumps(str(tmp_path / "absent")))
    (moved / "svdconvert.json").write_text(text)
    refused("chat", moved, *words, words=["--base"])
    expected = succeeded("chat", here / "pissa-trained", *words).out
    assert succeeded("chat", moved, *words, "--residual", here / "pissa").out == expected
    for kind in ("pissa-trained", "pissa"):
        refused("chat", here / kind, *words, "--residual", here / "base", words=[here / "base"])
    refused(
        "chat", here / "lora", *words, "--residual", here / "pissa", words=["--residual", "changes nothing"]
    )


def test_a_conversation_on_a_terminal(here: Path, tmp_path: Path) -> None:
    rwkv6.save(rwkv6.random_model(vocabulary=256), tmp_path / "rwkv.pth")
    with Session(["chat", tmp_path / "rwkv.pth", "--max-new-tokens", 1_000_000], tmp_path) as session:
        session.wait_for("/exit leaves")
        session.wait_for("> ")
        session.send("hello\n")
        session.wait_for_more(20)
        session.send("\x03")  # Ctrl-C, while the answer is written
        session.wait_for("\n> ")
        session.send("/nonsense\n")
        session.wait_for("there is no /nonsense")
        session.send("/reset\n")
        session.wait_for("forgotten")
        session.wait_for("\n> ")
        session.interrupt("type /exit or press Ctrl-D to leave")
        session.send("/exit\n")
        assert session.ended() == 0
    answer = session.all.partition("hello\n")[2].partition("^C")[0]
    assert len(answer) > 5
    assert [mark for mark in answer if not mark.isprintable() and mark not in "\n\t"] == []
