"""Only the adapters have dropout in training, and a model gets its settings back afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdconvert.errors import SvdConvertError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.model.modes import training_mode
from svdconvert.training.optim.loop import fit
from svdconvert.training.optim.objective import NextToken
from tests.training.small_runs import OPTIONS, MakeModel, adapted, examples, held_out_losses, losses, run


def test_the_models_own_dropout_is_off(make_model: MakeModel) -> None:
    assert losses(run(adapted(make_model()))) == losses(run(adapted(make_model(attention_dropout=0.5))))


def test_the_adapters_dropout_is_on_in_training_and_off_in_evaluation(make_model: MakeModel) -> None:
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
        model,
        DataSplits(examples(12)),
        NextToken(0),
        replace(OPTIONS, precision=precision, lr=rate, steps=40),
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


def test_gradient_checkpointing_saves_fewer_activations(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    kept = []
    for on in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base)
        sizes: list[int] = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        )
        with training_mode(model, gradient_checkpointing=on), keep:
            model(input_ids=torch.arange(3, 40)[None])
        kept.append(sum(sizes))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert kept[1] < 0.6 * kept[0]
