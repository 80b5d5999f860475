"""A sample of the families of transformers goes through the whole chain; `make families` takes them all."""

from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from tests.families.check import Family, examine
from tests.families.page import page
from tests.families.shrink import MOST_LAYERS, SPECIAL, VOCABULARY, shrunk
from tests.families.sweep import sweep

SAMPLE = {
    "causal": (
        "apertus", "bloom", "cohere2", "deepseek_v3", "falcon", "falcon_h1", "gemma2", "glm4_moe", "gpt2",
        "gpt_neox", "gpt_oss", "granitemoe", "hrm_text", "llama", "mamba", "mixtral", "nemotron_h", "olmo2",
        "opt", "phi3", "qwen2_moe", "qwen3_next", "smollm3",
    ),
    "image-text": ("gemma3", "qwen2_5_vl"),
}  # fmt: skip
FAMILIES = [(name, kind) for kind, names in SAMPLE.items() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "kind"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_a_family_goes_through_the_whole_chain(model_type: str, kind: str, tmp_path: Path) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version('transformers')} does not know {model_type}")
    family = examine(model_type, kind, tmp_path / "family")
    assert family.made and not family.fault, family.fault
    assert family.matrices > 0 and family.start is not None and family.lora is not None


def test_the_sample_is_of_25_families() -> None:
    assert len(FAMILIES) == 25


def test_a_shrunk_configuration_is_small_and_has_every_kind_of_layer() -> None:
    config = shrunk("qwen3_next")
    assert config.vocab_size == VOCABULARY and config.num_hidden_layers <= MOST_LAYERS
    assert {*config.layer_types} == {"linear_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers


def test_a_family_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    family = examine("unheard-of", "causal", tmp_path / "family")
    assert not family.made
    assert family.fault == "not made: KeyError: 'unheard-of'"


def test_kept_findings_are_found_again_only_if_the_tiny_model_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[str] = []

    def look(name: str, kind: str, directory: Path) -> Family:
        examined.append(name)
        return Family(name, kind, made=True, matrices=len(examined))

    monkeypatch.setattr("tests.families.sweep.examine", look)
    first = [*sweep({"llama", "opt"}, ["causal"], tmp_path)]
    assert [*sweep({"llama", "opt"}, ["causal"], tmp_path)] == first and len(examined) == 2
    monkeypatch.setitem(SPECIAL, "opt", {"num_hidden_layers": 1})
    again = [*sweep({"llama", "opt"}, ["causal"], tmp_path)]
    assert examined[2:] == ["opt"] and [family.matrices for family in again].count(3) == 1


def test_the_page_lists_what_holds_what_does_not_and_what_was_not_made() -> None:
    good = Family("one", "causal", made=True, matrices=7, start=2e-6, lora=3e-6, left=["a.b.router"])
    bad = Family("two", "causal", made=True, fault="it differs")
    absent = Family("three", "causal", fault="not made: no timm")
    text = page([good, bad, absent])
    assert "1 of 2 families" in text
    assert "| `one` | 7 |  | 2e-06 | 3e-06 | without `router` |" in text
    assert "- `two`: it differs" in text and "- `three`: no timm" in text
