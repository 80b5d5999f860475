"""Every module that reads the text or bytes of others is run by a target, so that no parser is left out."""

import re
import sys
from pathlib import Path

import pytest

from tests.fuzz.test_fuzz import TARGETS, kept, read_one

PACKAGE = Path(__file__).resolve().parents[2] / "svdconvert"
READING = re.compile(
    r"\b(json\.loads?|parse_json|read_json|read_json_object|safe_load|read_yaml|torch\.load|literal_eval|unpack|"
    r"unpack_from|iter_unpack|csv\.reader|model_validate|from_bytes)\("
)

# Module -> a target that runs it.
PARSERS = {
    "adapters/adapter_config.py": "adapter-config",
    "adapters/mlx.py": "mlx",
    "adapters/peft_files.py": "adapter-tensors",
    "checkpoint/gguf_file.py": "gguf",
    "checkpoint/header.py": "safetensors",
    "checkpoint/json_text.py": "index",
    "checkpoint/safetensors_files.py": "index",
    "checkpoint/torch_files.py": "pickled",
    "cli/run_command.py": "set",
    "config/mergekit_file.py": "mergekit",
    "config/recipe.py": "recipe",
    "config/yaml_file.py": "experiment",
    "evaluation/comparison.py": "evaluation",
    "evaluation/sandbox/runner.py": "sandbox-report",
    "evaluation/store.py": "evaluation",
    "inputs/engines.py": "inspect",
    "inputs/inspection.py": "inspect",
    "inputs/storage_format.py": "inspect",
    "manifest/claims.py": "evaluation",
    "manifest/evaluations.py": "evaluation",
    "manifest/schema.py": "manifest",
    "models/world_tokenizer.py": "vocabulary",
    "output/file_kinds.py": "sidecars",
    "output/journal.py": "journal",
    "output/measurements.py": "metrics",
    "output/ownership.py": "manifest",
    "output/sidecars.py": "config",
    "output/tokenizer_files.py": "sidecars",
    "publish/card.py": "card",
    "quantization/awq.py": "quantised",
    "quantization/bitsandbytes_4bit.py": "quantised",
    "quantization/gptq.py": "quantised",
    "quantization/pack_quantized.py": "quantised",
    "quantization/packing.py": "quantised",
    "training/data/chats.py": "row",
    "training/data/rows.py": "data-file",
    "workflow/record.py": "run-record",
}
# Modules that read what this program wrote a moment ago, or what another test attacks.
OTHERS = {
    "cli/lora_summaries.py": "the adapter that the command has just written",
    "inputs/base_shapes.py": "one name in an adapter_config.json that adapters/ has read",
    "layouts/loading.py": "one name in an adapter_config.json that adapters/ has read",
    "evaluation/harness_model.py": "options of the harness, as text for a key",
    "evaluation/published.py": "a file of the package",
    "evaluation/sandbox/child.py": "the task that this program sends to its own child",
    "layouts/automatic_cache.py": "the user's own cache",
    "output/pth_archive.py": "no text: it packs bytes",
    "publish/card_results.py": "the Hub's words on a leaderboard; tests/publish/test_results.py",
    "publish/files.py": "the directory that is pushed; tests/publish/test_upload.py",
    "publish/upload.py": "what was pushed before; tests/publish/test_upload.py",
    "training/model/load.py": "a tokenizer that transformers has read",
    "training/start.py": "options, to compare them",
    "workflow/perform.py": "options, to compare them",
}


def test_every_parser_has_a_target() -> None:
    reading = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if READING.search(path.read_text(encoding="utf-8"))
    }
    assert reading - PARSERS.keys() - OTHERS.keys() == set(), "add a target, and its name here"
    assert (PARSERS.keys() | OTHERS.keys()) - reading == set(), "these read nothing"
    assert {*PARSERS.values()} <= TARGETS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted({*PARSERS.values()}))
def test_a_target_runs_the_parsers_that_it_is_for(target: str, tmp_path: Path) -> None:
    wanted = {str(PACKAGE / module) for module, name in PARSERS.items() if name == target}
    called: set[str] = set()

    def note(frame: object, event: str, argument: object) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)  # type: ignore[attr-defined]

    for number, raw in enumerate(kept(target)):
        sys.setprofile(note)
        try:
            read_one(target, raw, tmp_path / str(number))
        finally:
            sys.setprofile(None)
        if wanted <= called:
            return
    assert wanted - called == set()
