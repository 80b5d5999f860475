"""Rows with images and the processors of released models: tokens, training, and stock PEFT on the results.

They need torchvision, which is not part of the extra `all`: `make test-vision` installs it next to .venv.
"""

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from svdconvert import Run, SplitOptions, TrainOptions, decompose, merge, to_lora, train
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import IGNORED
from svdconvert.training.model.load import load_processor
from tests.stock import same_bytes, tensors

pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow

from peft import PeftModel  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from tests.processors.build import FAMILIES, build  # noqa: E402

RUN = Run(device="cpu", threads=1)
COLOURS = {"1": (255, 0, 0), "2": (0, 0, 255), "3": (0, 255, 0), "4": (255, 255, 0)}
SIZES = {"1": (12, 8), "2": (8, 12), "3": (20, 9), "4": (16, 16)}
"""The images are of several sizes, so of several numbers of tokens for some models."""
QUESTION = "what?"
every_family = pytest.mark.parametrize("family", FAMILIES)


def encoded(answer: str) -> bytes:
    """The image whose answer this is, as a file."""
    stream = io.BytesIO()
    Image.new("RGB", SIZES[answer], COLOURS[answer]).save(stream, "PNG")
    return stream.getvalue()


def write_rows(path: Path, rows: int = 16) -> Path:
    """Rows that name their images by paths, and by data: addresses, in turns."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        answer = str(number % 4 + 1)
        (path.parent / "images" / f"{answer}.png").write_bytes(encoded(answer))
        address = f"data:image/png;base64,{base64.b64encode(encoded(answer)).decode()}"
        images = [f"images/{answer}.png" if number % 8 < 4 else address]
        lines.append(json.dumps({"question": QUESTION, "answer": answer, "images": images}) + "\n")
    path.write_text("".join(lines))
    return path


def turns(answer: str, *, with_image: bool) -> list[dict[str, Any]]:
    image = (
        {"type": "image", "image": Image.open(io.BytesIO(encoded(answer)))}
        if with_image
        else {"type": "image"}
    )
    return [
        {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


@torch.no_grad()
def stock_loss(network: Any, processor: Any, family: str) -> float:
    """The mean loss of the four answers, with stock transformers alone."""
    losses = []
    for answer in COLOURS:
        inputs = processor.apply_chat_template(
            turns(answer, with_image=True), tokenize=True, return_dict=True, return_tensors="pt"
        )
        reply = FAMILIES[family].reply % answer
        learned = processor.tokenizer(reply, add_special_tokens=False)["input_ids"]
        ids = inputs["input_ids"][0]
        stop = len(ids) - 1
        assert ids[stop - len(learned) : stop].tolist() == learned
        labels = torch.full_like(ids, IGNORED)
        labels[stop - len(learned) : stop] = ids[stop - len(learned) : stop]
        logits = network(**inputs).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED))
    return float(torch.stack(losses).mean())


@every_family
def test_the_tokens_are_those_of_stock_transformers(family: str, tmp_path: Path) -> None:
    build(family, tmp_path / "model")
    loaded = load_processor(tmp_path / "model")
    stock = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(stock).__name__ == FAMILIES[family].processor
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    encoder = TextRowEncoder(loaded.tokenizer, TrainOptions(max_length=250), lambda: loaded)
    examples = encoder(rows[2:6], tmp_path)
    for example, answer in zip(examples, ("3", "4", "1", "2"), strict=True):
        assert example is not None
        expected = stock.apply_chat_template(
            turns(answer, with_image=True), tokenize=True, return_dict=True, return_tensors="pt"
        )
        count = len(example.input_ids)
        assert expected["input_ids"][0][:count].tolist() == example.input_ids.tolist()
        learned = example.input_ids[example.labels != IGNORED]
        assert loaded.tokenizer.decode(learned).rstrip("\n") == FAMILIES[family].reply % answer
        batch = loaded.inputs([example], count)
        for name, tensor in batch.items():
            wanted = expected[name][:, :count] if tensor.shape == (1, count) else expected[name]
            torch.testing.assert_close(tensor, wanted)


@every_family
def test_rows_with_images_are_trained_and_stock_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    build(family, tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl")
    start, trained = tmp_path / "start", tmp_path / "trained"
    decompose(tmp_path / "base", start, SplitOptions(rank=4, targets=("all-linear", "vision")), RUN)
    options = TrainOptions(
        data=str(rows), steps=12, batch_size=4, max_length=250, lr=3e-2, eval_rows=4, eval_every=6,
        precision="fp32", warmup=0.0,
    )  # fmt: skip
    train(start, trained, options, RUN)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.1, losses
    merge(trained, tmp_path / "merged", run=RUN)
    to_lora(trained, tmp_path / "lora", run=RUN)
    merge(start, tmp_path / "back", run=RUN)
    assert same_bytes(tensors(tmp_path / "back"), tensors(tmp_path / "base"))

    def load(name: str) -> Any:
        return AutoModelForImageTextToText.from_pretrained(tmp_path / name).eval()

    processor = AutoProcessor.from_pretrained(start)
    found = partial(stock_loss, processor=processor, family=family)
    assert found(load("base")) == pytest.approx(losses[0], rel=1e-4)
    adapted = found(PeftModel.from_pretrained(load("start"), trained))
    assert adapted == pytest.approx(losses[-1], rel=1e-4)
    assert found(load("merged")) == pytest.approx(adapted, rel=1e-5)
    assert found(PeftModel.from_pretrained(load("base"), tmp_path / "lora")) == pytest.approx(
        adapted, rel=1e-5
    )
