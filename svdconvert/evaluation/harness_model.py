"""A model as lm-evaluation-harness asks it: scores of continuations, and greedy answers.

The only module that imports `lm_eval` at its beginning, and harness.py is the only one that imports it. One
class serves transformers' networks and our RWKV-6: rows are padded on the right for scores, where neither
attention nor a recurrent state sees the padding. Every answer is in a journal, batch by batch, so that a
killed run goes on; lm_eval's own cache is not used, because it is a file of pickles that does not know the
model. B: rows of the batch, T: tokens, V: vocabulary.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError
from svdconvert.evaluation.answering import Endings, Writer, context_length, ending_ids, plan_batches
from svdconvert.evaluation.asking import Answering
from svdconvert.output.journal import Journal

_LONGEST = 1 << 20
_TOKENS_OF_A_BATCH = 8192
_DEFAULT_TOKENS = 256
"""The limit of an answer if a task has none, as in lm_eval."""


@dataclass(frozen=True)
class _Score:
    """One continuation to score."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def key(self) -> str:
        return _key("score", self.context, self.continuation)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """An `lm_eval` model around a loaded network."""

    def __init__(self, model: Answering, journal: Journal, batch_size: int, name: str) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self._network: Any = model.network
        self._device = next(model.network.parameters()).device
        self._journal = journal
        self._size = batch_size
        self._name = name
        self._endings = ending_ids(model.network, model.tokenizer)
        self._context = context_length(model.network)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; 0 for RWKV's vocabulary."""
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """The most tokens of a text; RWKV has no limit."""
        return self._context or _LONGEST

    @property
    def tokenizer_name(self) -> str:
        """Needed by lm_eval for chat templates."""
        return str(getattr(self.tokenizer, "name_or_path", "tokenizer"))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, begun as the tokenizer begins texts, unless the text does so itself."""
        first = getattr(self.tokenizer, "bos_token", None)
        if add_special_tokens is None and first and string.startswith(first):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in `TemplateLM`, without its progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of the probability of whole texts, in windows of the network's length."""
        windows: list[list[_Score]] = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows.append([_Score(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, parts)])
        scores = iter(self._scores([window for parts in windows for window in parts]))
        return [sum(next(scores)[0] for _ in parts) for parts in windows]

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([_Score(tuple(context), tuple(after)) for _, context, after in requests])

    @torch.no_grad()
    def _scores(self, requests: Sequence[_Score]) -> list[tuple[float, bool]]:
        """(log probability, whether it is the greedy answer) of each; equal inputs are computed once."""
        inputs = dict.fromkeys(self._input(request) for request in requests)
        asking: dict[tuple[int, ...], dict[str, _Score]] = {ids: {} for ids in inputs}
        for request in requests:
            asking[self._input(request)][request.key()] = request
        done = 0
        for batch in _batches(list(inputs), self._size):
            wanted = {key: one for ids in batch for key, one in asking[ids].items()}
            if any(key not in self._journal.finished for key in wanted):
                self._score_batch(batch, asking)
            done += len(batch)
            report("answer", done, len(inputs), "texts", name=self._name)
        found = [self._journal.finished[request.key()] for request in requests]
        return [(float(record["score"]), bool(record["greedy"])) for record in found]

    def _input(self, request: _Score) -> tuple[int, ...]:
        """What the network reads: all but the last token, cut on the left."""
        return (request.context + request.continuation)[-(self.max_length + 1) :][:-1]

    def _score_batch(
        self, batch: Sequence[tuple[int, ...]], asking: Mapping[tuple[int, ...], Mapping[str, _Score]]
    ) -> None:
        logits_BTV = self._logits([torch.tensor(ids) for ids in batch])
        for row_TV, ids in zip(logits_BTV, batch, strict=True):
            for key, request in asking[ids].items():
                score, greedy = _score(row_TV[: len(ids)], request.continuation)
                self._journal.finish(key, {"score": score, "greedy": greedy})
        self._journal.sync()

    def _logits(self, rows: Sequence[Tensor]) -> Tensor:
        """(B, T, V) for rows of different lengths."""
        ids_BT = pad_sequence(list(rows), batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits: Tensor = self._network(
            input_ids=ids_BT.to(self._device), attention_mask=mask_BT.to(self._device)
        ).logits
        return logits

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers. Raises ArtifactError for a task that draws its answers at random."""
        groups: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(request.args for request in requests):
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(number)
        answers: dict[int, str] = {}
        for options, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            answers |= zip(numbers, self._answers(contexts, json.loads(options)), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _answers(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        endings = self._answer_endings(options)
        room = self.max_length - endings.max_new_tokens
        if room < 1:
            raise ArtifactError(
                f"{self._name} asks for {endings.max_new_tokens} new tokens, and the model takes "
                f"{self.max_length}; give another model"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        keys = [_key("answer", prompt, [json.dumps(options, sort_keys=True)]) for prompt in prompts]
        writer = Writer(self._network, self.tokenizer, prompts, endings)
        done = 0
        for batch in plan_batches([len(prompt) for prompt in prompts], self._size):
            if any(keys[row] not in self._journal.finished for row in batch):
                for row, answer in zip(batch, writer.answers(batch), strict=True):
                    record = {"text": answer.text, "tokens": answer.tokens, "end": answer.end}
                    self._journal.finish(keys[row], record)
                self._journal.sync()
            done += len(batch)
            report("answer", done, len(prompts), "texts", name=self._name)
        return [str(self._journal.finished[key]["text"]) for key in keys]

    def _answer_endings(self, options: Mapping[str, Any]) -> Endings:
        """Where answers end. Raises ArtifactError for options that sample."""
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ArtifactError(
                f"{self._name} draws its answers at random or searches with beams, and eval answers "
                "greedily: choose another task"
            )
        until = options.get("until") or []
        limit = options.get("max_gen_toks") or options.get("max_new_tokens") or _DEFAULT_TOKENS
        return Endings(
            max_new_tokens=int(limit),
            stops=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            ids=self._endings,
            context=self._context,
        )


def _batches(inputs: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Inputs in batches, the longest first, of at most `size` rows and, padded, about 8,192 tokens."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in sorted(inputs, key=lambda ids: (-len(ids), ids)):
        if not batches or len(batches[-1]) >= min(size, max(1, _TOKENS_OF_A_BATCH // len(batches[-1][0]))):
            batches.append([])
        batches[-1].append(ids)
    return batches


def _score(logits_TV: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """(log probability, whether every token is the most probable one) of the last tokens."""
    last_TV = logits_TV[-len(continuation) :].float().log_softmax(dim=-1)
    tokens_T = torch.tensor(continuation[-len(last_TV) :], device=last_TV.device)
    greedy = bool((last_TV.argmax(dim=-1) == tokens_T).all())
    return float(last_TV.gather(1, tokens_T[:, None]).sum()), greedy


def _key(kind: str, first: Sequence[int], second: Sequence[object]) -> str:
    return f"{kind} {sha256(json.dumps([list(first), list(second)]).encode()).hexdigest()}"
