"""Tasks of lm-evaluation-harness around our models, with data in local files.

lm_eval's own HFLM is the oracle for transformers' networks, and whole forward passes for RWKV-6.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.commands.evaluate import evaluate
from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.config.execution import Run
from svdconvert.errors import ArtifactError, MissingPackageError, OutputError, RecipeError, UnknownNameError
from svdconvert.evaluation import harness
from svdconvert.evaluation.harness import require_harness
from svdconvert.evaluation.loading import open_answering
from tests import rwkv6
from tests.evaluation.directories import lively

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choices.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: {sample}, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""
TEXTS = """
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with three tasks and their data."""
    pytest.importorskip("lm_eval")
    rows = [
        {"goal": f"goal {n}", "sol1": "one way" * n, "sol2": "another", "label": n % 2} for n in range(1, 6)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"q": "What is it? " * n, "a": " it"} for n in range(1, 5)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (tmp_path / f"local_{name}.yaml").write_text(text.format(folder=tmp_path, sample="false"))
    return tmp_path


@pytest.fixture(scope="module")
def writing_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def writing_rwkv6(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in its author's format, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("rwkv6")
    return rwkv6.save(rwkv6.random_model(vocabulary=256), folder / "model.pth", None)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "evaluations" / f"harness--{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_results_are_those_of_lm_evals_own_model(tasks: Path, writing_llama: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["local_choices", "local_answers", "local_texts"]
    given = [f"harness:{tasks / name}.yaml" for name in names]
    options = EvaluationOptions(dtype="float32", batch_size=2)
    results = evaluate(writing_llama, given, options, output=tasks / "out")
    network = AutoModelForCausalLM.from_pretrained(writing_llama, dtype=torch.float32)
    oracle = HFLM(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(writing_llama), batch_size=1)
    for name, result in zip(names, results, strict=True):
        expected = lm_eval.evaluate(oracle, harness._load(str(tasks / f"{name}.yaml")), bootstrap_iters=0)
        found = expected["results"][name]
        assert result.score == pytest.approx(float(found[f"{result.headline},none"]), rel=1e-5)
        for mine, theirs in zip(lines(tasks / "out", name), expected["samples"][name], strict=True):
            responses = json.loads(json.dumps(theirs["filtered_resps"]))
            if name == "local_answers":
                assert json.loads(mine["answer"]) == responses
            else:
                values = torch.tensor(json.loads(mine["answer"]), dtype=torch.float64)
                assert values == pytest.approx(torch.tensor(responses, dtype=torch.float64), abs=1e-4)
    again = evaluate(writing_llama, given, options, output=tasks / "out")
    assert again == results


@pytest.mark.slow
def test_a_killed_run_goes_on_and_another_model_is_refused(
    tasks: Path, writing_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdconvert.evaluation.harness_model import HarnessModel

    task = [f"harness:{tasks / 'local_choices.yaml'}"]
    options = EvaluationOptions(dtype="float32", batch_size=2)
    whole = evaluate(writing_llama, task, options, output=tasks / "whole")
    compute = HarnessModel._score_batch
    batches = 0

    def stop_after_two(self: Any, *arguments: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        compute(self, *arguments)

    monkeypatch.setattr(HarnessModel, "_score_batch", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(writing_llama, task, options, output=tasks / "out")
    batches = -100
    with pytest.raises(OutputError, match="batch_size|dtype"):
        evaluate(writing_llama, task, EvaluationOptions(dtype="float32", batch_size=3), output=tasks / "out")
    counted = batches
    found = evaluate(writing_llama, task, options, output=tasks / "out")
    assert batches - counted == 3  # of five batches, two were on the disk
    assert lines(tasks / "out", "local_choices") == lines(tasks / "whole", "local_choices")
    assert found[0].grades == whole[0].grades
    assert [path.name for path in (tasks / "out" / "evaluations").glob("*partial*")] == []


@pytest.mark.slow
def test_rwkv6_is_asked_too(tasks: Path, writing_rwkv6: Path) -> None:
    given = [f"harness:{tasks / name}.yaml" for name in ("local_choices", "local_answers", "local_texts")]
    results = evaluate(
        writing_rwkv6, given, EvaluationOptions(dtype="float32", batch_size=4), output=tasks / "out"
    )
    assert [result.data.rows for result in results] == [5, 4, 4]
    opened = open_answering(writing_rwkv6, Run())
    network = opened.load("float32", Run())
    tokenizer = opened.tokenizer(Run())
    for line in lines(tasks / "out", "local_texts"):
        text = json.loads(line["prompt"])["gen_args_0"]["arg_0"] if "gen_args_0" in line["prompt"] else None
        ids = tokenizer(text or json.loads(line["prompt"])[0][0])["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([[0, *ids[:-1]]])).logits[0].double().log_softmax(dim=-1)
        expected = logits.gather(1, torch.tensor(ids)[:, None]).sum()
        assert json.loads(line["answer"])[0] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.slow
def test_what_lm_eval_cannot_do_here_is_refused(tasks: Path, writing_llama: Path) -> None:
    out = tasks / "out"
    with pytest.raises(ArtifactError, match="lm_eval"):
        evaluate(writing_llama, ["harness:no_such_task_at_all"], output=out)
    (tasks / "local_answers.yaml").write_text(ANSWERS.format(folder=tasks, sample="true"))
    with pytest.raises(ArtifactError, match="random"):
        evaluate(writing_llama, [f"harness:{tasks / 'local_answers.yaml'}"], output=out)
    with pytest.raises(ArtifactError, match="sandbox"):
        (tasks / "unsafe.yaml").write_text((tasks / "local_texts.yaml").read_text() + "unsafe_code: true\n")
        evaluate(writing_llama, [f"harness:{tasks / 'unsafe.yaml'}"], output=out)
    with pytest.raises(RecipeError, match="data. changes nothing"):
        evaluate(writing_llama, [f"harness:{tasks / 'local_texts.yaml'}"], data="x.jsonl", output=out)


def test_names_are_checked_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"svdconvert\[eval\]"):
        require_harness("harness:piqa")
    for name in ("harness:", "harness:../x", "harness:a b", f"harness:{tmp_path}/none.yaml"):
        with pytest.raises(UnknownNameError):
            require_harness(name)
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    assert require_harness(f"harness:{tmp_path}/mine.yaml") == "harness:mine"


def test_two_tasks_with_one_file_of_results_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    (tmp_path / "Piqa.yaml").write_text("task: mine\n")
    for other in (f"harness:{tmp_path}/Piqa.yaml", "harness:PIQA"):
        with pytest.raises(RecipeError, match=r"harness:piqa and harness:P.* one file of results"):
            evaluate(tmp_path, ["harness:piqa", other], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
