"""Training gives the same numbers every time, however the rows are batched, and stops as the options say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import SvdConvertError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.example import Example, collate
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.loop import StepLog, fit
from svdconvert.training.optim.objective import NextToken
from tests.training.small_runs import (
    OPTIONS,
    MakeModel,
    adapted,
    examples,
    held_out_losses,
    losses,
    run,
    weights,
)


def test_the_loss_falls(make_model: MakeModel) -> None:
    model = adapted(make_model(initializer_range=0.2))
    logs = run(model, replace(OPTIONS, steps=30), held_out=examples(12))
    assert held_out_losses(logs)[30] < 0.7 * held_out_losses(logs)[0]
    assert losses(logs)[-1] < 0.7 * losses(logs)[0]


def test_the_first_loss_is_that_of_transformers(make_model: MakeModel) -> None:
    rows, model = examples(4), adapted(make_model())
    expected = model(**collate(rows, 0)).loss.item()
    (log,) = run(model, replace(OPTIONS, steps=1), train=rows)
    assert isinstance(log, StepLog)
    assert log.loss == pytest.approx(expected, rel=1e-6)
    assert log.tokens == sum(row.loss_tokens for row in rows)


def test_the_steps_are_those_of_a_plain_loop(make_model: MakeModel) -> None:
    rows, model, reference = examples(4), adapted(make_model()), adapted(make_model())
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    expected = []
    for _ in range(4):
        loss = reference(**collate(rows, 0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    logs = run(model, replace(OPTIONS, schedule="constant", clip=0.0), train=rows)
    assert losses(logs) == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_held_out_loss_is_the_mean_over_tokens_not_over_batches(make_model: MakeModel) -> None:
    rows, model = examples(5), adapted(make_model())
    expected = model(**collate(rows, 0)).loss.item()
    logs = run(model, replace(OPTIONS, steps=1, batch_size=2), held_out=rows)
    assert held_out_losses(logs)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 2), (1, 4), (3, 2)])
def test_only_the_product_of_batch_size_and_accumulation_matters(
    batch_size: int, accumulate: int, make_model: MakeModel
) -> None:
    size, options = batch_size * accumulate, replace(OPTIONS, steps=6)
    at_once = adapted(make_model())
    in_parts = adapted(make_model())
    expected = losses(run(at_once, replace(options, batch_size=size)))
    got = losses(run(in_parts, replace(options, batch_size=batch_size, accumulate=accumulate)))
    assert got == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights(at_once).items():
        torch.testing.assert_close(weights(in_parts)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, dropout=0.3)], ids=["plain", "dropout"])
def test_the_same_seed_gives_the_same_bits(options: TrainOptions, make_model: MakeModel) -> None:
    models = [adapted(make_model(), options.dropout) for _ in range(2)]
    first, second = (run(model, options, held_out=examples(3, seed=5)) for model in models)
    assert first == second
    assert all(torch.equal(t, weights(models[1])[name]) for name, t in weights(models[0]).items())


def test_another_seed_gives_another_order(make_model: MakeModel) -> None:
    assert losses(run(adapted(make_model()))) != losses(run(adapted(make_model()), replace(OPTIONS, seed=1)))


def test_every_epoch_sees_each_row_once_in_a_separate_order(make_model: MakeModel) -> None:
    model = adapted(make_model())
    rows = [
        Example(torch.full((5,), n, dtype=torch.int32), torch.full((5,), n, dtype=torch.int32))
        for n in range(10)
    ]
    seen: list[list[int]] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(args[0][:, 0].tolist())
    )
    run(model, replace(OPTIONS, steps=None, epochs=2.0), train=rows)
    del seen[0]  # the pass that looks at the head
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_the_logs_come_in_order(make_model: MakeModel) -> None:
    rows = examples(12)
    logs = run(
        adapted(make_model()), replace(OPTIONS, steps=5, eval_every=2), train=rows, held_out=examples(2)
    )
    kinds = [(type(log).__name__, log.step) for log in logs]
    steps, evals = [("StepLog", n) for n in range(1, 6)], [("EvalLog", n) for n in (0, 2, 4, 5)]
    assert kinds == [evals[0], *steps[:2], evals[1], *steps[2:4], evals[2], steps[4], evals[3]]
    tokens = [log.tokens for log in logs if isinstance(log, StepLog)]
    assert tokens[2] == sum(row.loss_tokens for row in rows)  # three steps of four are one epoch
    assert tokens == sorted(tokens)


def test_a_loss_that_is_not_finite_stops_with_advice(make_model: MakeModel) -> None:
    model = adapted(make_model())
    with pytest.raises(
        SvdConvertError, match=r"the loss became nan at step \d+ of 40: train with a learning rate lower than"
    ):
        run(model, replace(OPTIONS, lr=1e30, steps=40, clip=0.0))


def test_a_gradient_that_is_not_finite_does_not_change_the_weights(make_model: MakeModel) -> None:
    model = adapted(make_model())
    before = weights(model)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad / 0)
    with pytest.raises(SvdConvertError, match=r"the gradient became (nan|inf) at step 1 of 4"):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_only_the_adapter_changes(make_model: MakeModel) -> None:
    model = adapted(make_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(("lora_A", "lora_B"))}


def test_one_process_can_train_in_bf16_then_fp32_then_bf16(make_model: MakeModel) -> None:
    model = adapted(make_model())
    bf16 = run(adapted(make_model()), replace(OPTIONS, precision="bf16"))
    fp32 = run(adapted(make_model()))
    again = run(model, replace(OPTIONS, precision="bf16"))
    assert losses(bf16) == losses(again)
    assert losses(bf16) != losses(fp32)
    assert losses(bf16) == pytest.approx(losses(fp32), rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in weights(model).values())


# So high a rate that the held-out loss falls at first and rises then.
RISING = replace(OPTIONS, steps=30, lr=0.05, eval_every=1, eval_rows=1, schedule="constant")


def test_patience_ends_a_run_that_no_longer_improves(make_model: MakeModel) -> None:
    measured = held_out_losses(run(adapted(make_model()), RISING, held_out=examples(3, seed=5)))
    stopped_at = held_out_losses(
        run(adapted(make_model()), replace(RISING, patience=3), held_out=examples(3, seed=5))
    )
    assert stopped_at.items() <= measured.items()
    last = max(stopped_at)
    assert last < 30
    assert min(stopped_at, key=stopped_at.__getitem__) == last - 3


def test_the_best_weights_are_those_with_the_lowest_held_out_loss(
    make_model: MakeModel, tmp_path: Path
) -> None:
    held_out, options = examples(3, seed=5), replace(RISING, steps=12)
    measured = held_out_losses(run(adapted(make_model()), options, held_out=held_out))
    best = min(measured, key=measured.__getitem__)
    assert 0 < best < 12
    until, kept = adapted(make_model()), adapted(make_model())
    run(until, replace(options, steps=best), held_out=held_out)
    run(kept, replace(options, keep_best=True), held_out=held_out)
    assert all(torch.equal(tensor, weights(kept)[name]) for name, tensor in weights(until).items())
    # and a run that goes on has not forgotten them
    resumed, rows = adapted(make_model()), DataSplits(examples(12), held_out)
    options = replace(options, keep_best=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1)
    course = fit(adapted(make_model()), rows, NextToken(2), options, None, checkpoints)
    assert any(log.step == best + 2 for log in course)
    course.close()  # type: ignore[attr-defined]
    assert checkpoints.step > best
    list(fit(resumed, rows, NextToken(2), options, None, checkpoints))
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(until).items())
