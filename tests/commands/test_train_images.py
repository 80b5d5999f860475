"""Training on rows with images: the loss, stock transformers and PEFT on the results, and interruptions."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from svdconvert import Run, SplitOptions, TrainOptions, decompose, merge, to_lora, train
from svdconvert.errors import CheckpointError, DataError
from svdconvert.training.data.example import IGNORED
from svdconvert.training.model.load import load_processor
from tests import vision
from tests.program import content, refused
from tests.stock import same_bytes, tensors

pytestmark = pytest.mark.slow

STEPS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 4,
    "max_length": 100,
    "lr": 2e-2,
    "eval_rows": 4,
    "eval_every": 6,
    "precision": "fp32",
    "warmup": 0.0,
}
RUN = Run(device="cpu", threads=1)
FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "smolvlm")
every_family = pytest.mark.parametrize("family", FAMILIES)
Chain = Callable[[str], Path]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Family -> a directory with base, start, trained, merged and lora; made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            home = tmp_path_factory.mktemp(family)
            rows = vision.write_rows(home / "rows.jsonl")
            vision.build(family, home / "base")
            decompose(home / "base", home / "start", SplitOptions(rank=4), RUN)
            train(home / "start", home / "trained", TrainOptions(data=str(rows), **STEPS, samples=2), RUN)
            merge(home / "trained", home / "merged", run=RUN)
            to_lora(home / "trained", home / "lora", run=RUN)
            made[family] = home
        return made[family]

    return make


def measured(trained: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def stock_loss(network: Any, home: Path, images: Mapping[str, str] | None = None) -> float:
    """The loss of the held-out rows with transformers' own inputs; `images` are taken instead of others."""
    processor = load_processor(home / "base").processor
    losses = []
    for answer in ("1", "2", "3", "4"):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is ?"}]}]
        reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        text = processor.apply_chat_template(prompt + reply).rstrip()
        start = len(processor.apply_chat_template(prompt, add_generation_prompt=True))
        answers = processor.tokenizer(text[start:], add_special_tokens=False)["input_ids"]
        image = Image.open(home / "images" / f"{(images or {}).get(answer, answer)}.png")
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -len(answers)] = IGNORED
        with torch.no_grad():
            logits = network(**inputs).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED))
    return float(torch.stack(losses).mean())


@every_family
def test_the_loss_falls(family: str, chain: Chain) -> None:
    home = chain(family)
    held_out = measured(home / "trained", "eval_loss")
    assert len(held_out) == 3 and held_out[-1] < 0.9 * held_out[0]
    assert len((home / "trained" / "samples.jsonl").read_text().splitlines()) == 6


@every_family
def test_stock_transformers_and_peft_compute_the_same_loss(family: str, chain: Chain) -> None:
    home = chain(family)
    before, *_, after = measured(home / "trained", "eval_loss")

    def load(name: str) -> Any:
        return AutoModelForImageTextToText.from_pretrained(home / name).eval()

    assert stock_loss(load("base"), home) == pytest.approx(before, rel=1e-4)
    merged = load("merged")
    assert stock_loss(merged, home) == pytest.approx(after, rel=1e-4)
    trained = PeftModel.from_pretrained(load("start"), home / "trained")
    assert stock_loss(trained, home) == pytest.approx(after, rel=1e-4)
    lora = PeftModel.from_pretrained(load("base"), home / "lora")
    assert stock_loss(lora, home) == pytest.approx(after, rel=1e-4)
    others = {"1": "2", "2": "3", "3": "4", "4": "1"}
    assert not math.isclose(stock_loss(merged, home, others), after, rel_tol=1e-5), "images have no effect"


@every_family
def test_a_resumed_run_gives_the_same_bytes(family: str, chain: Chain, tmp_path: Path) -> None:
    home = chain(family)

    def watch(log: Any, steps: int) -> None:
        if log.step == 9:
            raise KeyboardInterrupt

    options = TrainOptions(data=str(home / "rows.jsonl"), **STEPS, samples=2, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(home / "start", tmp_path / "out", options, RUN, watch=watch)
    train(home / "start", tmp_path / "out", options, RUN)
    assert content(tmp_path / "out") == content(home / "trained")


def test_other_images_are_refused_when_a_run_is_resumed(chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    rows = vision.write_rows(tmp_path / "rows.jsonl")

    def watch(log: Any, steps: int) -> None:
        if log.step == 9:
            vision.write_images(tmp_path / "images", (8, 8))
            Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / "1.png")
            raise KeyboardInterrupt

    options = TrainOptions(data=str(rows), **STEPS, save_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(home / "start", tmp_path / "out", options, RUN, watch=watch)
    with pytest.raises(Exception, match="what the tokenizer and its chat template make of the rows"):
        train(home / "start", tmp_path / "out", options, RUN)


def test_an_image_that_changes_during_the_training_ends_it(chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    rows = vision.write_rows(tmp_path / "rows.jsonl")

    def watch(log: Any, steps: int) -> None:
        vision.write_images(tmp_path / "images", (8, 8))

    with pytest.raises(DataError, match=r"the image images/\d.png has changed since the training began"):
        train(home / "start", tmp_path / "out", TrainOptions(data=str(rows), **STEPS), RUN, watch=watch)


def test_rows_with_and_without_images_are_trained_together(chain: Chain, tmp_path: Path) -> None:
    """A batch size of one, and batches of several rows, give the same gradient and so the same losses."""
    home = chain("llava")
    vision.write_rows(tmp_path / "rows.jsonl")
    plain = [{"question": f"what is {n} ?", "answer": str(n), "images": []} for n in range(6)]
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in plain)
    common = {"data": str(tmp_path / "rows.jsonl"), "template": "chat", "steps": 4, "lr": 1e-2}
    losses = []
    for size, passes in ((6, 1), (1, 6), (2, 3)):
        options = TrainOptions(**common, batch_size=size, accumulate=passes, precision="fp32", max_length=100)
        train(home / "start", tmp_path / str(size), options, RUN)
        losses.append(measured(tmp_path / str(size), "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_text_rows_alone_need_no_processor(chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"what is {n} ?", "answer": str(n)}) + "\n" for n in range(8))
    )
    for name in ("processor_config.json", "preprocessor_config.json"):
        (home / "start" / name).rename(tmp_path / name) if (home / "start" / name).exists() else None
    try:
        train(home / "start", tmp_path / "out", TrainOptions(data=str(rows), steps=6, lr=2e-2), RUN)
        losses = measured(tmp_path / "out", "loss")
        assert losses[-1] < losses[0]
        pictures = vision.write_rows(tmp_path / "with.jsonl")
        with pytest.raises(CheckpointError, match="holds no processor of images"):
            train(home / "start", tmp_path / "other", TrainOptions(data=str(pictures)), RUN)
    finally:
        for name in ("processor_config.json", "preprocessor_config.json"):
            (tmp_path / name).rename(home / "start" / name) if (tmp_path / name).exists() else None


def test_the_folder_of_the_images_may_be_another_one(chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    (tmp_path / "rows").mkdir()
    rows = tmp_path / "rows" / "rows.jsonl"
    rows.write_bytes((home / "rows.jsonl").read_bytes())
    arguments = ["--data", rows, "--steps", 1]
    refused(
        "train", home / "start", "-o", tmp_path / "out", *arguments, words=["images/1.png", "cannot be read"]
    )
    options = TrainOptions(data=str(rows), image_dir=str(home), **STEPS, samples=2)
    train(home / "start", tmp_path / "out", options, RUN)
    assert same_bytes(tensors(tmp_path / "out"), tensors(home / "trained"))


@pytest.mark.parametrize("rows", ["without images", "with the bytes of images"])
def test_a_folder_that_no_row_uses_is_refused(rows: str, chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    image = {} if rows == "without images" else {"image": _address(home / "images" / "1.png")}
    row = {"question": "what is ?", "answer": "1", **image}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    options = TrainOptions(data=str(tmp_path / "rows.jsonl"), image_dir=str(home))
    with pytest.raises(DataError, match="`image_dir` changes nothing: no row names an image"):
        train(home / "start", tmp_path / "out", options, RUN)


def _address(path: Path) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_a_processor_of_another_model_is_refused(chain: Chain, tmp_path: Path) -> None:
    """Its token for images is not the one at which the network expects them."""
    home = chain("llava")
    config = json.loads((home / "base" / "config.json").read_text())
    vision.build("llava", tmp_path / "base")
    config["image_token_id"] = config["image_token_index"] = 50
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    split = SplitOptions(rank=4)
    options = TrainOptions(data=str(home / "rows.jsonl"), **STEPS)
    with pytest.raises(DataError, match="does not write the token with id 50, at which the model expects"):
        train(tmp_path / "base", tmp_path / "out", options, RUN, split=split)


def test_a_text_with_the_token_of_images_is_refused(chain: Chain, tmp_path: Path) -> None:
    home = chain("llava")
    row = {"question": "what is <image> ?", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises(DataError, match="a row without an image has the token '<image>'"):
        train(home / "start", tmp_path / "out", TrainOptions(data=str(tmp_path / "rows.jsonl")), RUN)


# --- towers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, targets by commas) -> a decomposed directory; made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, targets: str) -> Path:
        if (family, targets) not in made:
            out = tmp_path_factory.mktemp("seeing") / "start"
            decompose(
                chain(family) / "base", out, SplitOptions(rank=4, targets=tuple(targets.split(","))), RUN
            )
            made[family, targets] = out
        return made[family, targets]

    return make


@every_family
def test_a_decomposed_tower_sees_what_the_base_sees(
    family: str, chain: Chain, seeing: Callable[[str, str], Path], tmp_path: Path
) -> None:
    home = chain(family)
    start = seeing(family, "all-linear,vision")
    base = AutoModelForImageTextToText.from_pretrained(home / "base").eval()
    expected = stock_loss(base, home)
    residual = AutoModelForImageTextToText.from_pretrained(start).eval()
    assert stock_loss(residual, home) != pytest.approx(expected, rel=1e-3)
    adapted = PeftModel.from_pretrained(residual, start / "pissa_init")
    assert stock_loss(adapted, home) == pytest.approx(expected, rel=1e-5)
    merge(start, tmp_path / "merged", run=RUN)
    assert same_bytes(tensors(tmp_path / "merged"), tensors(home / "base"))


@every_family
def test_a_tower_alone_is_trained_by_images(
    family: str, chain: Chain, seeing: Callable[[str, str], Path], tmp_path: Path
) -> None:
    home = chain(family)
    start = seeing(family, "vision")
    train(start, tmp_path / "out", TrainOptions(data=str(home / "rows.jsonl"), **STEPS), RUN)
    losses = measured(tmp_path / "out", "eval_loss")
    assert losses[-1] != losses[0]
    residual = AutoModelForImageTextToText.from_pretrained(start).eval()
    trained = PeftModel.from_pretrained(residual, tmp_path / "out")
    assert stock_loss(trained, home) == pytest.approx(losses[-1], rel=1e-4)


@pytest.mark.parametrize("targets", ["vision", "all-linear,vision"])
def test_a_tower_without_images_is_refused_or_reported(
    targets: str, chain: Chain, seeing: Callable[[str, str], Path], tmp_path: Path
) -> None:
    start = seeing("llava", targets)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"question": "what is ?", "answer": "1"}) + "\n") * 4)
    options = TrainOptions(data=str(rows), steps=2, lr=1e-2)
    if targets == "vision":
        with pytest.raises(DataError, match="4 of the 4 rows have no image, and only towers are adapted"):
            train(start, tmp_path / "out", options, RUN)
        return
    said: list[str] = []
    train(start, tmp_path / "out", options, Run(device="cpu", threads=1, notify=said.append))
    assert any("14 of the 28 adapted matrices are in towers that no row reaches" in text for text in said)
