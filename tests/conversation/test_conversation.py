"""What a conversation asks the model, and how the answer comes out."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svdconvert.config.chat import ChatOptions
from svdconvert.conversation import conversation
from svdconvert.conversation.conversation import Conversation
from svdconvert.errors import DataError

EOS = 0


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    eos_token_id = EOS
    chat_template: str | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


class Scripted:
    """A decoder that says the same bytes whatever it is asked; what it is asked is kept."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def start(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self.asked.append(bytes(rows[0]).decode())
        self.place = 0
        return self._logits()

    def step(self, tokens_B: Tensor) -> Tensor:
        assert int(tokens_B[0]) == self.answer[self.place]
        self.place += 1
        return self._logits()

    def _logits(self) -> Tensor:
        logits = torch.zeros(1, 256)
        logits[0, self.answer[self.place] if self.place < len(self.answer) else EOS] = 1.0
        return logits


def talk_to(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, template: str = "none", **options: Any
) -> tuple[Conversation, Scripted]:
    script = Scripted(answer)
    monkeypatch.setattr(conversation, "open_decoder", lambda *_: script)
    tokenizer: Any = Bytes()
    return Conversation(nn.Linear(1, 1), tokenizer, template, ChatOptions(**options)), script


def test_pieces_come_token_by_token_and_never_in_the_middle_of_a_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "naïve 日本 ok"
    talk, _ = talk_to(text.encode(), monkeypatch)
    pieces = [piece for piece in talk.ask("hello") if piece]
    assert pieces == list(text)


def test_an_answer_that_is_cut_in_a_character_shows_that(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _ = talk_to("日本".encode(), monkeypatch, max_new_tokens=4)
    assert "".join(talk.ask("hello")) == "日\N{REPLACEMENT CHARACTER}"


def test_an_answer_ends_at_the_limit_and_at_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _ = talk_to(b"abcdef", monkeypatch, max_new_tokens=3)
    assert "".join(talk.ask("hello")) == "abc"
    talk, _ = talk_to(b"abcdef", monkeypatch)
    assert "".join(talk.ask("hello")) == "abcdef"


def test_a_template_is_filled_with_each_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, script = talk_to(b"yes", monkeypatch, "Q: {prompt}\nA:")
    for question in ("one", "two"):
        assert "".join(talk.ask(question)) == "yes"
    assert script.asked == ["Q: one\nA:", "Q: two\nA:"]


def test_a_chat_template_sees_what_was_said_until_it_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, script = talk_to(b"yes", monkeypatch, "chat")
    monkeypatch.setattr(
        conversation,
        "render_turns",
        lambda turns, *_, **__: "|".join(f"{turn['role'][0]}:{turn['content']}" for turn in turns),
    )
    for _ in talk.ask("one"):
        break  # as when the user stops an answer: what was said by then counts
    list(talk.ask("two"))
    talk.reset()
    list(talk.ask("three"))
    assert script.asked == ["u:one", "u:one|a:y|u:two", "u:three"]


def test_a_prompt_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, _ = talk_to(b"yes", monkeypatch)
    config = SimpleNamespace(max_position_embeddings=5)
    vars(talk.network)["config"] = SimpleNamespace(get_text_config=lambda: config)
    assert "".join(talk.ask("123")) == "ye"
    with pytest.raises(DataError, match="7 tokens and the model takes 5"):
        list(talk.ask("1234567"))
    with pytest.raises(DataError, match="empty"):
        list(talk.ask("  "))
