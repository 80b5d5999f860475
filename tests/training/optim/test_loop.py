"""Training: the same numbers every time, however the rows are batched, and a model left as it was."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError, SvdConvertError
from svdconvert.linalg.factors import Factors
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.encode import collate
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.model.inject import extract_factors, install
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.loop import EvalLog, StepLog, fit
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.optim.schedule import learning_rate

MakeModel = Callable[..., LlamaForCausalLM]
PLAN = TrainOptions(lr=1e-2, steps=4, batch_size=4, precision="fp32", device="cpu", warmup=0.0)
BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture(autouse=True)
def _no_accelerator_is_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows of 5 to 12 tokens, of which the first 2 to 4 are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 13, (), generator=generator))
        ids = torch.randint(3, 20, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: int(torch.randint(2, 5, (), generator=generator))] = IGNORED
        made.append(Example(ids, labels))
    return made


def adapted(model: LlamaForCausalLM, dropout: float = 0.0) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(1)
    pieces = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            left = torch.randn(module.out_features, 4, generator=generator) * 0.1
            right = torch.randn(4, module.in_features, generator=generator) * 0.1
            pieces[path] = (Factors(left, right), 1.0)
    install(model, pieces, BOTH, dropout)
    return model


def run(model: LlamaForCausalLM, plan: TrainOptions = PLAN, **options: Any) -> list[StepLog | EvalLog]:
    rows = DataSplits(options.get("train", examples(12)), options.get("held_out", []))
    return list(fit(model, rows, NextToken(options.get("pad_id", 2)), plan, None, options.get("checkpoints")))


def losses(logs: list[StepLog | EvalLog]) -> list[float]:
    return [log.loss for log in logs if isinstance(log, StepLog)]


def held_out_losses(logs: list[StepLog | EvalLog]) -> dict[int, float]:
    return {log.step: log.eval_loss for log in logs if isinstance(log, EvalLog)}


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": t for path, f in extract_factors(model).items() for name, t in f.pieces().items()
    }


# --- what is minimised ------------------------------------------------------------------------------------


def test_the_loss_falls(make_model: MakeModel) -> None:
    model = adapted(make_model(initializer_range=0.2))
    logs = run(model, replace(PLAN, steps=30), held_out=examples(12))
    assert held_out_losses(logs)[30] < 0.7 * held_out_losses(logs)[0]
    assert losses(logs)[-1] < 0.7 * losses(logs)[0]


def test_the_first_loss_is_transformers_own(make_model: MakeModel) -> None:
    rows, model = examples(4), adapted(make_model())
    expected = model(**collate(rows, 0)).loss.item()
    (log,) = run(model, replace(PLAN, steps=1), train=rows)
    assert isinstance(log, StepLog)
    assert log.loss == pytest.approx(expected, rel=1e-6)
    assert log.tokens == sum(row.loss_tokens for row in rows)


def test_the_steps_are_those_of_a_loop_written_out(make_model: MakeModel) -> None:
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
    logs = run(model, replace(PLAN, schedule="constant", clip=0.0), train=rows)
    assert losses(logs) == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_held_out_loss_is_the_mean_over_tokens_not_over_batches(make_model: MakeModel) -> None:
    rows, model = examples(5), adapted(make_model())
    expected = model(**collate(rows, 0)).loss.item()
    logs = run(model, replace(PLAN, steps=1, batch_size=2), held_out=rows)
    assert held_out_losses(logs)[0] == pytest.approx(expected, rel=1e-6)


def test_a_model_that_cannot_choose_positions_gets_the_same_loss(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = run(adapted(make_model()))
    whole = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any) -> Any:
        return whole(self, input_ids=input_ids)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    assert losses(run(adapted(make_model()))) == pytest.approx(losses(chosen), rel=1e-5)


def test_only_positions_with_loss_get_logits(make_model: MakeModel) -> None:
    model, seen = adapted(make_model()), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    row = Example(torch.arange(8, dtype=torch.int32), torch.tensor([IGNORED] * 6 + [6, 7], dtype=torch.int32))
    run(model, replace(PLAN, steps=1), train=[row])
    assert seen == [2]


def test_the_padding_token_makes_no_difference(make_model: MakeModel) -> None:
    first, second = run(adapted(make_model()), pad_id=0), run(adapted(make_model()), pad_id=5)
    assert losses(first) == losses(second)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 2), (1, 4), (3, 2)])
def test_accumulation_weighs_by_tokens_so_that_only_the_product_matters(
    batch_size: int, accumulate: int, make_model: MakeModel
) -> None:
    size, plan = batch_size * accumulate, replace(PLAN, steps=6)
    whole, parts = adapted(make_model()), adapted(make_model())
    expected = losses(run(whole, replace(plan, batch_size=size)))
    got = losses(run(parts, replace(plan, batch_size=batch_size, accumulate=accumulate)))
    assert got == pytest.approx(expected, rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-3, atol=1e-4)


# --- the same every time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, dropout=0.3)], ids=["plain", "dropout"])
def test_the_same_seed_gives_the_same_bits(plan: TrainOptions, make_model: MakeModel) -> None:
    models = [adapted(make_model(), plan.dropout) for _ in range(2)]
    first, second = (run(model, plan, held_out=examples(3, seed=5)) for model in models)
    assert first == second
    assert all(torch.equal(t, weights(models[1])[name]) for name, t in weights(models[0]).items())


def test_another_seed_gives_another_order(make_model: MakeModel) -> None:
    assert losses(run(adapted(make_model()))) != losses(run(adapted(make_model()), replace(PLAN, seed=1)))


def test_every_epoch_sees_each_row_once_in_an_order_of_its_own(make_model: MakeModel) -> None:
    model = adapted(make_model())
    rows = [
        Example(torch.full((5,), n, dtype=torch.int32), torch.full((5,), n, dtype=torch.int32))
        for n in range(10)
    ]
    seen: list[list[int]] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(args[0][:, 0].tolist())
    )
    run(model, replace(PLAN, steps=None, epochs=2.0), train=rows)
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))


def test_the_logs_come_in_order(make_model: MakeModel) -> None:
    rows = examples(12)
    logs = run(adapted(make_model()), replace(PLAN, steps=5, eval_every=2), train=rows, held_out=examples(2))
    kinds = [(type(log).__name__, log.step) for log in logs]
    steps, evals = [("StepLog", n) for n in range(1, 6)], [("EvalLog", n) for n in (0, 2, 4, 5)]
    assert kinds == [evals[0], *steps[:2], evals[1], *steps[2:4], evals[2], steps[4], evals[3]]
    tokens = [log.tokens for log in logs if isinstance(log, StepLog)]
    assert tokens[2] == sum(row.loss_tokens for row in rows)  # three steps of four are one epoch
    assert tokens == sorted(tokens)


# --- rates and gradients ----------------------------------------------------------------------------------


def rates(total: int, **options: Any) -> list[float]:
    plan = TrainOptions(lr=1.0, **options)
    return [learning_rate(plan, step, total) for step in range(1, total + 1)]


def test_the_warm_up_rises_to_the_rate_and_wastes_no_step() -> None:
    assert rates(8, warmup=0.5, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    # a share of a step is a step
    assert rates(4, warmup=0.03, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_schedules_fall_to_zero_behind_the_last_step() -> None:
    assert rates(4, warmup=0.0, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, warmup=0.0, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert rates(3, warmup=0.0, schedule="constant") == [1.0, 1.0, 1.0]


def transformers_rates(schedule: str, warm: int, total: int) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warm, num_training_steps=total)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedules_are_transformers_but_for_their_first_step_of_rate_zero(schedule: str) -> None:
    assert rates(20, warmup=0.0, schedule=schedule) == pytest.approx(transformers_rates(schedule, 0, 20))
    assert rates(20, warmup=0.15, schedule=schedule) == pytest.approx(transformers_rates(schedule, 3, 21)[1:])


def test_the_rates_reach_the_optimizer_and_the_log(make_model: MakeModel) -> None:
    plan = replace(PLAN, lr=1e-3, steps=1, warmup=0.0, schedule="constant", clip=0.0)
    model = adapted(make_model())
    before = weights(model)
    (log,) = run(model, plan)
    assert isinstance(log, StepLog)
    assert log.lr == 1e-3
    # AdamW's first step is the rate itself, in the direction of the gradient's sign.
    moves = torch.cat([(tensor - before[name]).abs().flatten() for name, tensor in weights(model).items()])
    assert moves.median() == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_shrinks_the_adapter(make_model: MakeModel) -> None:
    plan = replace(PLAN, lr=1e-3, steps=1, weight_decay=100.0)
    plain, decayed = adapted(make_model()), adapted(make_model())
    run(plain, replace(plan, weight_decay=0.0))
    run(decayed, plan)
    start = weights(adapted(make_model()))
    for name, tensor in weights(plain).items():
        # AdamW takes rate x decay = 0.1 of the value, apart from the gradient's own step.
        torch.testing.assert_close(weights(decayed)[name], tensor - 0.1 * start[name])


def test_clipping_bounds_the_norm_of_all_gradients_together(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(grads).norm()))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(adapted(make_model()), replace(PLAN, steps=2, clip=0.0))
    assert min(norms) > 0.05
    norms.clear()
    run(adapted(make_model()), replace(PLAN, steps=2, clip=0.05))
    assert norms == pytest.approx([0.05, 0.05], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_with_advice(make_model: MakeModel) -> None:
    model = adapted(make_model())
    with pytest.raises(
        SvdConvertError, match=r"the loss became nan at step \d+ of 40: train with a lower rate"
    ):
        run(model, replace(PLAN, lr=1e30, steps=40, clip=0.0))


def test_a_gradient_that_is_not_finite_is_not_taken(make_model: MakeModel) -> None:
    model = adapted(make_model())
    before = weights(model)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad / 0)
    with pytest.raises(SvdConvertError, match=r"the gradient became (nan|inf) at step 1 of 4"):
        run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


# --- what is left alone -----------------------------------------------------------------------------------


def test_only_the_adapter_changes(make_model: MakeModel) -> None:
    model = adapted(make_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(("lora_A", "lora_B"))}


def test_the_models_own_dropout_stays_off(make_model: MakeModel) -> None:
    assert losses(run(adapted(make_model()))) == losses(run(adapted(make_model(attention_dropout=0.5))))


def test_the_adapters_dropout_is_on_in_training_and_off_in_measuring(make_model: MakeModel) -> None:
    plain = run(adapted(make_model()), held_out=examples(3))
    dropped = run(adapted(make_model(), dropout=0.5), held_out=examples(3))
    assert held_out_losses(dropped)[0] == held_out_losses(plain)[0]
    assert losses(dropped)[0] != losses(plain)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ends", ["at its end", "early", "in an error"])
def test_the_model_gets_its_settings_back(precision: str, ends: str, make_model: MakeModel) -> None:
    model = adapted(make_model()).train()
    model.lm_head.eval()
    attributes, forward = set(vars(model)), model.forward
    rate = 1e30 if ends == "in an error" else 1e-2
    logs = fit(
        model, DataSplits(examples(12)), NextToken(0), replace(PLAN, precision=precision, lr=rate, steps=40)
    )
    next(logs)
    assert model.config.use_cache is False
    if ends == "early":
        logs.close()  # type: ignore[attr-defined]
    elif ends == "in an error":
        with pytest.raises(SvdConvertError):
            list(logs)
    else:
        list(logs)
    assert model.config.use_cache is True
    assert (model.training, model.lm_head.training) == (True, False)
    assert set(vars(model)) == attributes
    assert model.forward == forward


# --- machines ---------------------------------------------------------------------------------------------


def test_bf16_and_fp32_follow_each_other_in_one_process(make_model: MakeModel) -> None:
    model = adapted(make_model())
    bf16 = run(adapted(make_model()), replace(PLAN, precision="bf16"))
    fp32 = run(adapted(make_model()))
    again = run(model, replace(PLAN, precision="bf16"))
    assert losses(bf16) == losses(again)
    assert losses(bf16) != losses(fp32)
    assert losses(bf16) == pytest.approx(losses(fp32), rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in weights(model).values())


def test_precision_and_device_are_the_plans() -> None:
    for precision, expected in (("bf16", "bf16"), ("fp32", "no")):
        accelerator = make_accelerator(replace(PLAN, precision=precision))
        assert (accelerator.mixed_precision, accelerator.device.type) == (expected, "cpu")


@pytest.mark.parametrize(("units", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_takes_bf16_on_a_cpu_that_multiplies_it(
    units: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert make_accelerator(replace(PLAN, precision="auto")).mixed_precision == expected


def test_a_way_to_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(RecipeError, match="accelerate is set to FSDP.*use DDP"):
        make_accelerator(PLAN)


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(RecipeError, match="fp16 needs a GPU.*give bf16 or fp32"):
        make_accelerator(replace(PLAN, precision="fp16"))


@pytest.mark.parametrize("device", ["xpu:9", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(RecipeError, match=f"device {device}"):
        make_accelerator(replace(PLAN, device=device))


def test_a_plan_without_a_rate_is_a_mistake_of_the_caller(make_model: MakeModel) -> None:
    with pytest.raises(AssertionError, match="with_rate"):
        run(adapted(make_model()), replace(PLAN, lr=None))
