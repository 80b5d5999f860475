"""What `svdconvert doctor` says of the installation and the machine."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from svdconvert import doctor
from svdconvert.diagnosis import packages
from svdconvert.diagnosis.packages import is_at_least
from tests.program import succeeded, svdconvert

TOKEN = "hf_secretsecretsecret"


@pytest.mark.parametrize(
    ("found", "least", "enough"),
    [
        ("2.13.0+cpu", "2.6", True),
        ("2.6", "2.6.0", True),
        ("0.9.9", "0.10", False),
        ("1.10.0", "1.9", True),
        ("2026.11.15", "2024.5.15", True),
        ("5.0.0rc1", "5.1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, least: str, enough: bool) -> None:
    assert is_at_least(found, least) is enough


def test_it_names_the_versions_threads_memory_and_disk_of_this_machine() -> None:
    known = {fact.name: fact.value for fact in doctor()}
    assert known["torch"].startswith(version("torch"))
    assert known["transformers"].startswith(version("transformers"))
    assert sys.version.split()[0] in known["Python"]
    assert known["threads of torch"] == str(torch.get_num_threads())
    assert known["cores"].split(",")[0] == str(os.cpu_count())
    for name in ("memory", "free disk here", "free disk of the Hub's cache"):
        assert any(unit in known[name] for unit in ("GB", "TB", "MB"))


def test_every_required_package_and_extra_has_a_line() -> None:
    facts = doctor()
    required = {fact.name.lower().replace("_", "-") for fact in facts if fact.section == "packages"}
    assert {"torch", "transformers", "huggingface-hub", "typer", "pydantic", "safetensors"} <= required
    extras = {fact.name for fact in facts if fact.section == "extras"}
    assert {"peft", "wandb", "scores", "rwkv"} <= extras
    assert {"dev", "all", "docs"} & extras == set()


def test_what_is_missing_is_said_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(name: str) -> str:
        if name in ("accelerate", "wandb"):
            raise PackageNotFoundError(name)
        return "0.1" if name == "datasets" else version(name)

    monkeypatch.setattr(packages, "version", pretend)
    ended = svdconvert("doctor")
    assert ended.status == 1
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("  ")}
    assert 'MISSING: not installed: pip install "accelerate>=' in lines["accelerate"]
    assert 'MISSING: 0.1 is too old: pip install "datasets>=' in lines["datasets"]
    assert 'note: wandb not installed or too old: pip install "svdconvert[wandb]"' in lines["wandb"]
    found = json.loads(svdconvert("doctor", "--json").out)
    assert found["passed"] is False
    missing = {fact["name"] for fact in found["facts"] if fact["state"] == "missing"}
    assert missing == {"accelerate", "datasets"}


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_the_token_is_never_shown_and_text_from_outside_is_escaped(
    form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", f"/tmp/{TOKEN}\x1b[2J")
    ended = succeeded("doctor", *form)
    assert "present (HF_TOKEN)" in ended.out
    assert TOKEN not in ended.out + ended.err
    assert "\x1b" not in ended.out


def test_an_address_with_a_password_is_shown_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret@hub.example:8443/path?key=secret")
    known = {fact.name: fact.value for fact in doctor()}
    assert known["address"] == "https://hub.example:8443"
