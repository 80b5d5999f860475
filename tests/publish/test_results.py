"""Evaluations are published with the weights that they belong to, and never with others."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from svdconvert.manifest.evaluations import read_evaluations
from svdconvert.manifest.schema import read_manifest
from svdconvert.publish import card_results
from svdconvert.publish.card_results import is_full_gsm8k, own_results, result_files
from tests.conftest import Build
from tests.evaluated import graded, write_result
from tests.loopback_hub.server import Hub
from tests.publish.test_upload import pushed
from tests.visitor import Visitor

FULL = {"name": "openai/gsm8k", "config": "main", "split": "test", "sha256": "0", "rows": 1319}
EVAL = "name: x\ntasks:\n- id: other\n  config: socratic\n- id: grade-school\n  config: main\n"


@pytest.fixture
def directory(checkpoint: Build, decomposed: Build, tmp_path: Path) -> Path:
    """A DECOMPOSED directory."""
    return Path(shutil.copytree(decomposed(checkpoint("llama")), tmp_path / "pissa"))


def has_leaderboard(hub: Hub, tmp_path: Path) -> None:
    """Publish GSM8K's data set as the Hub has it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "eval.yaml").write_text(EVAL)
    hub.create("datasets/openai/gsm8k", tmp_path / "data")


def front(hub: Hub, name: str) -> dict[str, Any]:
    """The front matter of a published card."""
    found: dict[str, Any] = yaml.safe_load(card(hub, name).split("---\n")[1])
    return found


def card(hub: Hub, name: str) -> str:
    """A published card."""
    return hub.repositories[name].read("README.md").decode()


def test_results_of_the_weights_are_sent_and_stand_in_the_card(
    hub: Hub, alice: Visitor, directory: Path
) -> None:
    write_result(directory, [True, True, False, True])
    other = {"kind": "x", "fingerprint": "0", "name": "y"}
    write_result(directory, [True, False], task="math", model=other)
    unsent = pushed(alice, directory, "alice/x")[3]
    names = hub.repositories["alice/x"].names()
    assert {"evaluations/gsm8k.json", "evaluations/gsm8k.jsonl"} <= {*names}
    assert not any("math" in name for name in names)
    assert {*unsent} == {"evaluations/math.json", "evaluations/math.jsonl"}
    assert ".eval_results/gsm8k.yaml" not in names
    (entry,) = front(hub, "alice/x")["model-index"]
    assert entry["name"] == "x"
    (result,) = entry["results"]
    assert result["dataset"] == {"name": "gsm8k", "type": "openai/gsm8k", "config": "main", "split": "test"}
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [("accuracy", 75.0)]
    assert "| gsm8k | strict | 4 | 75.0% | 30.1% to 95.4% | 0 |" in card(hub, "alice/x")
    assert "math" not in card(hub, "alice/x")
    # What is published passes verify, and so does the result in it.
    assert "1 compared with their answers" in alice.succeeds("verify", "alice/x").out


def test_the_front_matter_without_results_has_no_model_index(
    hub: Hub, alice: Visitor, directory: Path
) -> None:
    pushed(alice, directory, "alice/x")
    assert "model-index" not in front(hub, "alice/x") and "model_name" not in front(hub, "alice/x")


def full_result(directory: Path, **data: Any) -> None:
    """A result on all of GSM8K, with 700 right answers."""
    write_result(directory, [True] * 700 + [False] * 619, data=FULL | data)


def test_a_full_strict_run_of_gsm8k_goes_to_the_leaderboard_under_the_id_that_the_data_set_names(
    hub: Hub, alice: Visitor, directory: Path, tmp_path: Path
) -> None:
    has_leaderboard(hub, tmp_path)
    full_result(directory)
    pushed(alice, directory, "alice/x")
    (entry,) = yaml.safe_load(hub.repositories["alice/x"].read(".eval_results/gsm8k.yaml"))
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "grade-school"}
    assert entry["value"] == pytest.approx(53.07)
    assert "strict" in entry["notes"]


def test_only_all_rows_without_a_limit_are_a_full_run(directory: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"limit": 1319},
        {"rows": 1000},
        {"split": "train"},
        {"name": "rows.jsonl"},
    ]
    found = []
    for data in [{}, *changes]:
        full_result(directory, **data)
        found.append(is_full_gsm8k(read_evaluations(directory)[0]))
    assert found == [True, False, False, False, False]


@pytest.mark.parametrize("text", [None, "tasks: 3", "- x", "tasks:\n- id: a\n  config: socratic\n", "\x00{"])
def test_without_the_data_sets_word_on_its_leaderboard_no_id_is_guessed(
    directory: Path, tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*repository: object, **options: object) -> str:
        if text is None:
            raise OSError("no network")
        (tmp_path / "eval.yaml").write_text(text)
        return str(tmp_path / "eval.yaml")

    monkeypatch.setattr(card_results, "hub_api", lambda: SimpleNamespace(hf_hub_download=answer))
    full_result(directory)
    sent = result_files(own_results(directory, read_manifest(directory)))
    assert {*sent} == {"evaluations/gsm8k.json", "evaluations/gsm8k.jsonl"}


def test_a_damaged_result_stops_the_push_before_anything_is_sent(
    hub: Hub, alice: Visitor, directory: Path
) -> None:
    path, _ = write_result(directory, [True])
    path.write_text(json.dumps({"format": 7}))
    assert "has format 7" in pushed(alice, directory, "alice/x")
    assert not hub.repositories.get("alice/x") or hub.repositories["alice/x"].names() == []


@pytest.mark.parametrize("change", ["result", "headline", "answers", "no answers"])
def test_a_result_that_its_answers_do_not_give_stops_the_push(
    change: str, hub: Hub, alice: Visitor, directory: Path
) -> None:
    path, answers = write_result(directory, [True, False])
    content = json.loads(path.read_text())
    if change == "result":
        content["grades"]["strict"] = graded(2, 0, 2)
        content["metrics"]["accuracy"] = 1.0
    elif change == "headline":
        content["metrics"]["accuracy"] = 0.99
    elif change == "answers":
        answers.write_text(answers.read_text().replace("false", "true"))
    else:
        answers.unlink()
    path.write_text(json.dumps(content))
    assert "gsm8k.json" in str(pushed(alice, directory, "alice/x"))
    assert not hub.repositories.get("alice/x") or hub.repositories["alice/x"].names() == []
