"""RWKV-6 against the rwkv package, published logits, and itself."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from svdconvert.checkpoint.renamed import as_family
from svdconvert.errors import CheckpointError
from svdconvert.inputs.model import open_model
from svdconvert.models.rwkv6 import Rwkv6, load
from svdconvert.models.wkv6 import EXACT, WIDE, Form, token_by_token
from tests import rwkv_cpp
from tests.models.oracle import needs_rwkv, rwkv_logits
from tests.program import succeeded
from tests.rwkv6 import random_model, save

TOKENS = [(7 * place * place + 3 * place) % 61 for place in range(100)]
MORE = [5, 6, 7]


def opened(path: Path, dtype: torch.dtype | None = torch.float32) -> Rwkv6:
    """The model of a checkpoint in any layout."""
    home = open_model(str(path))
    family = home.layout()[1].family
    assert family is not None
    return load(as_family(home.source, family.rules, str(path)), dtype)


@pytest.fixture
def model(tmp_path: Path) -> Rwkv6:
    return opened(save(random_model(), tmp_path / "m.pth", torch.float32))


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.slow
@needs_rwkv
@pytest.mark.parametrize(("head", "state"), [(8, False), (32, True), (64, False)])
@torch.no_grad()
def test_logits_are_the_rwkv_packages(head: int, state: bool, tmp_path: Path) -> None:
    path = save(random_model(width=128, head=head, state=state), tmp_path / "m.pth", torch.float32)
    wanted, behind = rwkv_logits(path, tmp_path, TOKENS, MORE)
    model = opened(path)
    assert wanted.std() > 0.2
    for form, allowed in ((token_by_token, 1e-6), (WIDE, 1e-5), (EXACT, 1e-5)):
        with model.computing(form):
            found = model(ids(TOKENS))
            after = model(ids(MORE), state=found.state)
        assert (found.logits[0] - wanted).abs().max() <= allowed
        assert (after.logits[0] - behind).abs().max() <= allowed


@pytest.mark.skipif(
    not rwkv_cpp.MODEL.exists(), reason=f"{rwkv_cpp.MODEL} is not there; see tests/rwkv_cpp.py"
)
@torch.no_grad()
def test_a_trained_model_says_what_was_published(tmp_path: Path) -> None:
    """What is left is the rounding of its weights to five bits."""
    model = opened(save(rwkv_cpp.trained_model(), tmp_path / "3m.pth", torch.float32))
    logits = model(ids(list(rwkv_cpp.PROMPT))).logits[0, -1]
    wanted = rwkv_cpp.expected_logits()
    assert torch.corrcoef(torch.stack([logits, wanted]))[0, 1] > 0.9999
    # It was trained on UTF-16.
    text = bytes(model.answer(rwkv_cpp.PROMPT, 100, stop=-1)).replace(b"\0", b"").decode()
    assert text.startswith("ice of the store ")


@pytest.mark.parametrize("layout", ["hf", "fla", "web-rwkv"])
@torch.no_grad()
def test_every_layout_is_the_same_model(layout: str, tmp_path: Path) -> None:
    path = save(random_model(width=96), tmp_path / "m.pth", torch.float32)
    succeeded("convert", path, "-o", tmp_path / "out", "--layout", layout)
    assert torch.equal(opened(tmp_path / "out")(ids(TOKENS)).logits, opened(path)(ids(TOKENS)).logits)


def test_gradients_of_every_parameter_are_the_recurrences(model: Rwkv6) -> None:
    def gradients(form: Form) -> dict[str, Tensor]:
        model.zero_grad()
        model.tune_states()
        with model.computing(form):
            logits = model(ids(TOKENS, TOKENS[::-1])).logits
            cross_entropy(
                logits[:, :-1].flatten(0, 1), ids(TOKENS[1:], TOKENS[::-1][1:]).flatten()
            ).backward()
        return {
            name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
        }

    wanted = gradients(token_by_token)
    assert len(wanted) == 62 + 2
    assert all(grad.any() for grad in wanted.values())
    for form in (WIDE, EXACT):
        for name, grad in gradients(form).items():
            assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_recomputing_gives_the_same_gradients(model: Rwkv6) -> None:
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(ids(TOKENS)).logits.logsumexp(-1).sum().backward()
        found.append(model.blocks[0].att.key.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*found)


@torch.no_grad()
def test_padding_to_the_right_and_texts_in_one_row_do_not_meet(model: Rwkv6) -> None:
    first, second = TOKENS[:40], TOKENS[40:65]
    alone = [model(ids(row)).logits[0] for row in (first, second)]
    padded = model(ids(first, second + [0] * 15)).logits
    assert torch.allclose(padded[0], alone[0], atol=1e-5)
    assert torch.allclose(padded[1, :25], alone[1], atol=1e-5)
    positions = ids([*range(40), *range(25)])
    packed = model(ids(first + second), position_ids=positions).logits[0]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


@torch.no_grad()
def test_a_text_goes_on_from_its_state(model: Rwkv6) -> None:
    whole = model(ids(TOKENS)).logits
    first = model(ids(TOKENS[:33]))
    rest = model(ids(TOKENS[33:]), state=first.state).logits
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-5)


def test_a_tuned_state_is_the_initial_state_of_a_text_and_can_be_trained(model: Rwkv6) -> None:
    before = model(ids(TOKENS)).logits.detach()
    states = model.tune_states()
    assert torch.equal(model(ids(TOKENS)).logits, before)
    optimizer = torch.optim.Adam(states, 0.3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(model(ids(TOKENS[:20])).logits[0, :-1], torch.tensor(TOKENS[1:20]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses


@torch.no_grad()
def test_generation_takes_the_likeliest_until_the_end_of_the_text(model: Rwkv6) -> None:
    tokens = list(TOKENS[:5])
    for token in model.answer(tokens[:], 8, stop=-1):
        assert token == int(model(ids(tokens)).logits[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 13
    assert list(model.answer(TOKENS[:5], 8, stop=tokens[7])) == tokens[5:7]
    assert list(model.answer([], 2, choose=lambda logits: 7)) == [7, 7]
    config = SimpleNamespace(max_new_tokens=8, eos_token_id=-1)
    assert model.generate(ids(TOKENS[:5]), generation_config=config).tolist() == [tokens]


@torch.no_grad()
def test_half_precision_runs_with_the_state_in_float32(tmp_path: Path) -> None:
    path = save(random_model(), tmp_path / "m.pth", torch.bfloat16)
    half, whole = opened(path, None), opened(path)
    found = half(ids(TOKENS))
    assert found.logits.dtype == torch.bfloat16
    assert found.state[0][1].dtype == torch.float32
    wanted = whole(ids(TOKENS)).logits
    assert (found.logits.float() - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_tensors_that_disagree_are_named(tmp_path: Path) -> None:
    tensors = random_model()
    tensors["blocks.1.att.time_decay"] = torch.zeros(1, 1, 63)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.time_decay .* \(1, 1, 63\)"):
        opened(save(tensors, tmp_path / "m.pth"))
