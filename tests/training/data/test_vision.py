"""Rows with images as tokens: only the answers are in the loss, and the images' inputs fit the tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.dataset import read_dataset
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.vision import ImageTextProcessor
from svdconvert.training.model.load import load_processor
from tests import vision

LoadProcessor = Callable[[str], ImageTextProcessor]
every_family = pytest.mark.parametrize("family", vision.FAMILIES)


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LoadProcessor:
    """The processor of a family, loaded from a tiny model's directory."""
    made: dict[str, ImageTextProcessor] = {}

    def load(family: str) -> ImageTextProcessor:
        if family not in made:
            made[family] = load_processor(vision.build(family, tmp_path_factory.mktemp(family) / "model"))
        return made[family]

    return load


def encode(loaded: ImageTextProcessor, row: dict[str, Any], folder: Path, **options: Any) -> Example | None:
    vision.write_images(folder / "images")
    chosen = TrainOptions(**{"max_length": 200, **options})
    encoder = TextRowEncoder(loaded.tokenizer, chosen, lambda: loaded)
    return encoder([row], folder)[0]


def learned(example: Example, loaded: ImageTextProcessor) -> str:
    ids = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    return str(loaded.tokenizer.decode(ids))


ONE = "images/1.png"
CHATS: dict[str, dict[str, Any]] = {
    "a question": {"question": "what is ?", "answer": "1", "image": ONE},
    "a prompt": {"prompt": "what is ?", "completion": "1", "images": [ONE]},
    "a chat with a part": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is ?"}]},
            {"role": "assistant", "content": "1"},
        ],
        "images": [ONE],
    },
    "a chat with the image in its part": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "path": ONE}, {"type": "text", "text": "what is ?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
        ]
    },
    "a chat with a mark": {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is ?"},
            {"from": "gpt", "value": "1"},
        ],
        "image": ONE,
    },
    "a chat without a place": {
        "messages": [{"role": "user", "content": "what is ?"}, {"role": "assistant", "content": "1"}],
        "images": [ONE],
    },
}


@every_family
@pytest.mark.parametrize("kind", CHATS)
def test_every_form_of_a_row_gives_the_same_tokens(
    family: str, kind: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    loaded = processor(family)
    found = encode(loaded, CHATS[kind], tmp_path)
    same = encode(loaded, CHATS["a question"], tmp_path)
    assert found is not None and same is not None and found.images is not None and same.images is not None
    assert torch.equal(found.input_ids, same.input_ids) and torch.equal(found.labels, same.labels)
    assert found.images.checksum == same.images.checksum
    assert learned(found, loaded) == "1 <end>"


@every_family
def test_the_tokens_are_those_of_the_processors_chat_template(
    family: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    """Stock transformers makes the inputs of inference in one call."""
    loaded = processor(family)
    found = encode(loaded, CHATS["a chat with a part"], tmp_path)
    assert found is not None
    turns = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(tmp_path / ONE)},
                {"type": "text", "text": "what is ?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    ]
    stock = loaded.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    count = len(found.input_ids)
    assert torch.equal(stock["input_ids"][0][:count].int(), found.input_ids)
    batch = loaded.inputs([found], count)
    for name, tensor in batch.items():
        expected = stock[name][:, :count] if tensor.shape == (1, count) else stock[name]
        torch.testing.assert_close(tensor, expected)


TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "<image> what is ?"},
        {"role": "assistant", "content": "1 is 1"},
        {"role": "user", "content": "what is <image> ?"},
        {"role": "assistant", "content": "2 is 2"},
    ],
    "images": [ONE, "images/2.png"],
}


@every_family
def test_the_answers_between_images_are_learned(
    family: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    loaded = processor(family)
    found = encode(loaded, TWO_TURNS, tmp_path)
    assert found is not None
    assert learned(found, loaded) == "1 is 1 <end> 2 is 2 <end>"


@every_family
def test_with_prompt_loss_everything_but_the_images_is_learned(
    family: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    loaded = processor(family)
    found = encode(loaded, TWO_TURNS, tmp_path, prompt_loss=True)
    assert found is not None
    image = loaded.tokenizer.convert_tokens_to_ids("<image>")
    assert not (found.labels == image).any()
    text = learned(found, loaded)
    assert text.count("what is") == 2 and text.endswith("2 is 2 <end>")


@every_family
def test_a_row_is_cut_before_an_image_that_does_not_fit(
    family: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    loaded = processor(family)
    whole = encode(loaded, TWO_TURNS, tmp_path)
    assert whole is not None
    images = (whole.input_ids == loaded.tokenizer.convert_tokens_to_ids("<image>")).nonzero().flatten()
    cut = encode(loaded, TWO_TURNS, tmp_path, max_length=int(images[-1]))
    assert cut is not None and cut.images is not None
    assert len(cut.images.images) == 1 and cut.length == len(whole.input_ids)
    assert learned(cut, loaded) == "1 is 1 <end>"
    assert torch.equal(cut.input_ids, whole.input_ids[: len(cut.input_ids)])
    loaded.inputs([cut], len(cut.input_ids))
    assert encode(loaded, TWO_TURNS, tmp_path, max_length=int(images[0]) + 1) is None
    after = encode(loaded, TWO_TURNS, tmp_path, max_length=int(images[-1]) + 14)
    assert after is not None and after.images is not None and len(after.images.images) == 2


@every_family
def test_a_batch_has_the_inputs_of_its_rows(family: str, processor: LoadProcessor, tmp_path: Path) -> None:
    """Rows of different lengths and numbers of images: what the processor pads has the batch's length."""
    loaded = processor(family)
    rows = [encode(loaded, TWO_TURNS, tmp_path), encode(loaded, CHATS["a question"], tmp_path)]
    found = [row for row in rows if row is not None]
    length = max(len(row.input_ids) for row in found)
    batch = loaded.inputs(found, length)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row.input_ids) for row in found]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in batch:
            assert batch[name].shape == (2, length) and not batch[name][1, len(found[1].input_ids) :].any()


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "too few images": (
        {"question": "<image> <image> ?", "answer": "1", "image": ONE},
        {},
        "it has 1 images, and more places",
    ),
    "too many images": (
        {"question": "<image> ?", "answer": "1", "images": [ONE, ONE]},
        {},
        "it has 2 images, and only 1 places",
    ),
    "a missing image": (
        {"question": "?", "answer": "1", "images": ["images/9.png"]},
        {},
        r"row 1: its image 'images/9.png' cannot be read",
    ),
    "a text without a prompt": ({"text": "1", "image": ONE}, {}, "a text without a prompt"),
    "another template": (
        {"question": "?", "answer": "1", "image": ONE},
        {"template": "none"},
        "leave template out",
    ),
    "no message of the user": (
        {
            "messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "1"}],
            "image": ONE,
        },
        {},
        "no message of the user",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_does_not_fit_its_images_is_named(
    kind: str, processor: LoadProcessor, tmp_path: Path
) -> None:
    row, options, complaint = BAD[kind]
    with pytest.raises(DataError, match=complaint):
        encode(processor("llava"), row, tmp_path, **options)


def test_the_token_of_an_image_in_a_text_is_no_place_for_another_one(
    processor: LoadProcessor, tmp_path: Path
) -> None:
    row = {"question": "<boi> what is ?", "answer": "1", "image": ONE}
    with pytest.raises(DataError, match="writes 2 places .* for its 1 images"):
        encode(processor("gemma3"), row, tmp_path)


def test_packing_is_for_rows_without_images(processor: LoadProcessor, tmp_path: Path) -> None:
    rows = vision.write_rows(tmp_path / "rows.jsonl")
    options = TrainOptions(data=str(rows), packing=True)
    loaded = processor("llava")
    with pytest.raises(DataError, match="`packing` is for rows without images"):
        read_dataset(options, TextRowEncoder(loaded.tokenizer, options, lambda: loaded))


def test_other_images_are_other_data(processor: LoadProcessor, tmp_path: Path) -> None:
    """A run is not resumed with other images of the same names and sizes."""
    loaded = processor("llava")

    def checksum() -> str:
        options = TrainOptions(data=str(tmp_path / "rows.jsonl"))
        return read_dataset(options, TextRowEncoder(loaded.tokenizer, options, lambda: loaded)).checksum()

    vision.write_rows(tmp_path / "rows.jsonl")
    before = checksum()
    assert checksum() == before
    (tmp_path / "images" / "1.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
    assert checksum() != before


def test_images_of_parquet_files_are_their_bytes(processor: LoadProcessor, tmp_path: Path) -> None:
    """`datasets` marks a column of images, and would decode it."""
    from datasets import Dataset, Features, Image, List, Value

    folder = vision.write_images(tmp_path / "images")
    features = Features({"question": Value("string"), "answer": Value("string"), "images": List(Image())})
    content = (folder / "1.png").read_bytes()
    row = {"question": "what is ?", "answer": "1", "images": [{"bytes": content, "path": None}]}
    Dataset.from_list([row] * 3, features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text((json.dumps({**row, "images": [ONE]}) + "\n") * 3)
    loaded = processor("llava")
    read = []
    for name in ("rows.parquet", "rows.jsonl"):
        options = TrainOptions(data=str(tmp_path / name))
        read.append(read_dataset(options, TextRowEncoder(loaded.tokenizer, options, lambda: loaded)))
    assert read[0].checksum() == read[1].checksum()
    in_row = read[0].train[0].images
    assert in_row is not None and in_row.images[0].content is not None


def test_a_model_of_texts_ignores_images_and_says_so(processor: LoadProcessor, tmp_path: Path) -> None:
    rows = vision.write_rows(tmp_path / "rows.jsonl")
    options = TrainOptions(data=str(rows))
    splits = read_dataset(options, TextRowEncoder(processor("llava").tokenizer, options))
    assert not splits.has_images
    assert any("not images" in warning for warning in splits.warnings)
