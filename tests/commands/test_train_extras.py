"""What a trainer is expected to do beside training: samples, trackers, warnings, less memory."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from svdconvert import Run, SplitOptions, TrainOptions, train
from svdconvert.errors import MissingPackageError
from svdconvert.methods.base import METHODS
from svdconvert.training.learning_rates import learning_rate_warning
from tests.conftest import Build
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums
from tests.stock import same_bytes, tensors

PLAN = {"steps": 4, "batch_size": 2, "max_length": 48, "lr": 1e-2, "eval_rows": 3, "eval_every": 2}
LORA = SplitOptions(method="lora", rank=4)


@pytest.fixture(scope="module")
def base(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_sums(home / "sums.jsonl")
    return readable(checkpoint("llama", dtype=torch.float32), home / "base")


def plan(base: Path, **changes: object) -> TrainOptions:
    return TrainOptions(**{"data": str(base.parent / "sums.jsonl"), **PLAN, **changes})


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_model_answers_held_out_prompts_as_it_goes(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "out", plan(base, samples=2, sample_tokens=5), Run(threads=1), split=LORA)
    answers = lines(tmp_path / "out" / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 0, 2, 2, 4, 4]
    assert all(answer.keys() == {"step", "prompt", "response"} for answer in answers)
    assert answers[0]["prompt"] == answers[2]["prompt"] != answers[1]["prompt"]
    assert "what is" in str(answers[0]["prompt"])
    assert all(len(str(answer["response"]).split()) <= 5 for answer in answers)
    train(base, tmp_path / "silent", plan(base), Run(threads=1), split=LORA)
    # asking changes nothing
    assert same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "silent"))
    assert not (tmp_path / "silent" / "samples.jsonl").exists()


def test_the_last_answers_are_those_of_the_trained_model(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"samples": 1, "sample_tokens": 6, "steps": 12, "precision": "fp32"}
    train(base, tmp_path / "out", plan(base, **options), Run(threads=1), split=LORA)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    last = lines(tmp_path / "out" / "samples.jsonl")[-1]
    ids = tokenizer(last["prompt"], add_special_tokens=False, return_tensors="pt")
    made = stock.generate(**ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert last["response"] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit(precision: str, base: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("again", True)):
        options = {"gradient_checkpointing": on, "precision": precision, "dropout": 0.2}
        train(base, tmp_path / name, plan(base, **options), Run(threads=1), split=LORA)
    assert same_bytes(tensors(tmp_path / "plain"), tensors(tmp_path / "again"))
    metrics = [content(tmp_path / name)["metrics.jsonl"] for name in ("plain", "again")]
    assert metrics[0] == metrics[1]


def test_gradient_checkpointing_keeps_fewer_activations(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    from svdconvert.training.optim.step import as_trained

    kept = []
    for on in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base)
        sizes: list[int] = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        )
        with as_trained(model, checkpointing=on), keep:
            model(input_ids=torch.arange(3, 40)[None])
        kept.append(sum(sizes))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert kept[1] < 0.6 * kept[0]


def test_prompts_can_be_learnt_too(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "all", plan(base, prompt_loss=True), split=LORA)
    train(base, tmp_path / "answers", plan(base), split=LORA)
    tokens = [lines(tmp_path / name / "metrics.jsonl")[-2]["tokens"] for name in ("all", "answers")]
    assert int(str(tokens[0])) > 2 * int(str(tokens[1]))


# --- warnings ---------------------------------------------------------------------------------------------


def test_another_methods_rate_is_named_with_both_papers() -> None:
    said = learning_rate_warning("pissa", METHODS.get("lora").learning_rate)
    assert said is not None
    assert "lr 0.0002 is the rate of lora" in said
    assert METHODS.get("pissa").paper in said and "2e-05" in said
    for name in METHODS.names():
        assert learning_rate_warning(name, METHODS.get(name).learning_rate) is None
    assert learning_rate_warning("pissa", 1.1e-4) is None


def test_the_command_line_says_it_and_trains(base: Path, tmp_path: Path) -> None:
    options = ("--data", base.parent / "sums.jsonl", "--steps", 1, "--rank", 4, "--max-length", 48)
    said = succeeded("train", base, "-o", tmp_path / "out", *options, "--lr", 2e-4).err
    assert "is the rate of lora" in said
    short = ("--template", "none", "--max-length", 10)
    said = succeeded("train", base, "-o", tmp_path / "other", *options, *short).err
    assert "rows are longer than max_length 10 and are cut" in said
    assert "is the rate of" not in said


# --- trackers ---------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_metrics(base: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track = {"track": "tensorboard", "track_dir": str(tmp_path / "runs")}
    train(base, tmp_path / "out", plan(base, **track), Run(threads=1), split=LORA)
    train(base, tmp_path / "silent", plan(base), Run(threads=1), split=LORA)
    assert content(tmp_path / "out") == content(tmp_path / "silent")
    (folder,) = {path.parent for path in (tmp_path / "runs" / "out").glob("events*")}
    read = events.EventAccumulator(str(folder))
    read.Reload()
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
    found = {event.step: event.value for event in read.Scalars("loss")}
    assert found == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in read.Scalars("eval_loss")] == [0, 2, 4]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdconvert.training.logs.trackers.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r'wandb is not installed: pip install "svdconvert\[wandb\]"'
    ):
        train(base, tmp_path / "out", plan(base, track="wandb"), split=LORA)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_trackers_name_is_no_tracker(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # as its runs leave one
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match="wandb is not installed"):
        train(base, tmp_path / "out", plan(base, track="wandb"), split=LORA)


def test_an_unknown_tracker_is_refused(base: Path, tmp_path: Path) -> None:
    words = ["track knows tensorboard, trackio, wandb, not mlflow"]
    refused("train", base, "-o", tmp_path / "out", "--data", "x", "--track", "mlflow", words=words)
