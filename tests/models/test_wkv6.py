"""Every form of the recurrence is the recurrence: values and gradients, whatever the decay."""

import pytest
import torch
from torch import Tensor

from svdconvert.models.wkv6 import EXACT, WIDE, Chunks, doubled, form_for, token_by_token, wkv6

FORMS = {"wide": WIDE, "exact": EXACT}
# Ranges of omega, the logarithm of what the log-decay is the negative of. Trained models reach a = -30.
RANGES = [(-8.0, -1.0), (-8.0, 2.0), (-8.0, 6.0), (-3.0, 12.0)]


def inputs(low: float, high: float, tokens: int = 75, size: int = 16) -> list[Tensor]:
    """r, k, v, a, u and a state, in float64."""
    noise = torch.Generator().manual_seed(3)
    r, k, v = torch.randn(3, 2, 2, tokens, size, generator=noise, dtype=torch.float64)
    omega = low + (high - low) * torch.rand(2, 2, tokens, size, generator=noise, dtype=torch.float64)
    u = torch.randn(2, size, generator=noise, dtype=torch.float64)
    state = torch.randn(2, 2, size, size, generator=noise, dtype=torch.float64)
    return [r, k, v, -omega.exp(), u, state]


def defined(r: Tensor, k: Tensor, v: Tensor, a: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in float64, with einsum."""
    outputs = []
    for t in range(r.shape[2]):
        bonus = torch.einsum("bhn,hn,bhn->bh", r[:, :, t], u, k[:, :, t])[..., None] * v[:, :, t]
        outputs.append(bonus + torch.einsum("bhn,bhnj->bhj", r[:, :, t], state))
        state = a[:, :, t].exp()[..., None] * state + torch.einsum("bhn,bhj->bhnj", k[:, :, t], v[:, :, t])
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [1, 8, 16, 63, 64, 65, 130])
def test_a_form_is_the_recurrence_at_every_length(name: str, tokens: int) -> None:
    given = inputs(-8, 2, tokens)
    for found, wanted in zip(FORMS[name](*(x.float() for x in given)), defined(*given), strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("span", RANGES)
def test_gradients_are_those_of_the_recurrence_whatever_the_decay(
    name: str, span: tuple[float, float]
) -> None:
    exact = [x.requires_grad_() for x in inputs(*span)]
    rounded = [x.detach().float().requires_grad_() for x in exact]
    for leaves, form in ((exact, defined), (rounded, FORMS[name])):
        y, state = form(*leaves)
        (y.square().sum() + state.square().sum()).backward()  # type: ignore[no-untyped-call]
    for wanted, found in zip(exact, rounded, strict=True):
        assert wanted.grad is not None and found.grad is not None
        assert found.grad.isfinite().all()
        assert (found.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


def test_token_by_token_is_the_definition() -> None:
    given = inputs(-8, 2)
    for found, wanted in zip(token_by_token(*given), defined(*given), strict=True):
        assert (found - wanted).abs().max() < 1e-12


def test_the_derivative_of_doubling_passes_gradcheck() -> None:
    given = [x.requires_grad_() for x in inputs(-4, 2, tokens=9, size=3)]
    assert torch.autograd.gradcheck(Chunks(doubled, 4), given)


@pytest.mark.parametrize("name", FORMS)
def test_without_gradients_the_values_are_the_same_and_the_inputs_are_left_alone(name: str) -> None:
    """Without gradients WIDE computes in place. A length of whole chunks: nothing is copied to be padded."""
    given = [x.float() for x in inputs(-8, 6, tokens=64)]
    before = [x.clone() for x in given]
    wanted = FORMS[name](*given)
    with torch.no_grad():
        found = FORMS[name](*given)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_a_state_carried_on_is_one_sequence(name: str) -> None:
    r, k, v, a, u, state = (x.float() for x in inputs(-8, 2, tokens=90))
    whole, end = FORMS[name](r, k, v, a, u, state)
    first, middle = FORMS[name](*(x[:, :, :37] for x in (r, k, v, a)), u, state)
    second, last = FORMS[name](*(x[:, :, 37:] for x in (r, k, v, a)), u, middle)
    assert (torch.cat([first, second], 2) - whole).abs().max() < 1e-5
    assert (last - end).abs().max() < 1e-5


def test_the_form_is_chosen_by_the_device_and_autocast_does_not_reach_it() -> None:
    assert (form_for(torch.device("cpu")), form_for(torch.device("cuda"))) == (WIDE, EXACT)
    given = [x.float() for x in inputs(-8, 2)]
    plain = wkv6(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(wkv6(*given), plain, strict=True))
