"""svdconvert chat: talk to a model, or to an adapter with the weights that it belongs to."""

from collections.abc import Sequence
from pathlib import Path

from svdconvert.config.chat import ChatOptions
from svdconvert.config.execution import Run
from svdconvert.config.progress import report, tracked
from svdconvert.conversation.conversation import Conversation, open_conversation
from svdconvert.linalg.threads import use_threads


@tracked
def chat(  # noqa: PLR0913 (two locations that override the manifest's)
    model: str | Path,
    prompts: Sequence[str],
    options: ChatOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
) -> list[str]:
    """The answers of a model to several prompts, each in a conversation of its own.

    `model` is a directory of any kind, any LoRA in PEFT's format, or a model of the Hub; `base` and
    `residual` override the locations of the weights that an adapter belongs to. Raises SvdConvertError with
    one sentence.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of texts; write [prompt] for one")
    conversation = start_chat(model, options, run, base=base, residual=residual)
    answers = []
    for number, prompt in enumerate(prompts):
        report("answer", number, len(prompts), "prompts")
        answers.append("".join(conversation.ask(prompt)))
        conversation.reset()
    return answers


@tracked
def start_chat(
    model: str | Path,
    options: ChatOptions | None = None,
    run: Run | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
) -> Conversation:
    """A conversation with a model; `Conversation.ask` yields an answer piece by piece. See `chat`."""
    run = run or Run()
    use_threads(run.threads)
    return open_conversation(model, options or ChatOptions(), run, base=base, residual=residual)
