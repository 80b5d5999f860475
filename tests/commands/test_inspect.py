"""Of every directory, inspect says what it is, whose it is and what comes next."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from svdconvert import Run, SplitOptions, decompose, inspect
from svdconvert.config.progress import Progress
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.stock import start_of, trained_from


def test_a_plain_checkpoint(checkpoint: Build) -> None:
    found = inspect(checkpoint("qwen2"))
    assert (found.kind, found.details["layout"], found.details["matrices"]) == ("checkpoint", "qwen", 14)
    assert found.details["roles"]["attn.q"] == 2
    assert found.next == [
        f"svdconvert decompose {checkpoint('qwen2')} -o DECOMPOSED --plan",
        f"svdconvert decompose {checkpoint('qwen2')} -o DECOMPOSED",
    ]


def test_a_checkpoint_of_no_known_layout(checkpoint: Build, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "rwkv99"}')
    found = inspect(model)
    assert (found.kind, found.next) == ("checkpoint", [])
    assert "'rwkv99'" in found.summary


def test_what_decompose_wrote(checkpoint: Build, tmp_path: Path) -> None:
    model, out = checkpoint("llama"), tmp_path / "out"
    decompose(model, out, SplitOptions(rank=4, targets=("attn",)))
    found = inspect(out)
    assert (found.kind, found.details["base"]) == ("decomposed", str(model))
    assert "not a usable model without the initial pissa adapter" in found.summary
    assert found.details["options"] == {"rank": 4, "targets": ["attn"]}
    assert found.details["trained_parameters"] == 4 * 2 * (2 * (32 + 32) + 2 * (16 + 32))
    assert 0 < found.details["mean_energy"] < 1
    assert found.next[0] == f"svdconvert train {out} -o TRAINED --data FILE"


def test_an_adapter_for_the_untouched_base_is_not_called_a_residual(
    checkpoint: Build, tmp_path: Path
) -> None:
    decompose(checkpoint("llama"), tmp_path / "out", SplitOptions(method="lora", rank=4))
    assert inspect(tmp_path / "out").summary == "an initial lora adapter for the untouched base"


def test_a_base_that_is_gone_is_called_so(checkpoint: Build, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    decompose(model, tmp_path / "out", SplitOptions(rank=4))
    model.rename(tmp_path / "elsewhere")
    assert inspect(tmp_path / "out").details["base"] == f"{model} (not found)"


def test_what_merge_and_to_lora_wrote(checkpoint: Build, decomposed: Build, tmp_path: Path) -> None:
    out = decomposed(checkpoint("llama"))
    succeeded("merge", out, "-o", tmp_path / "merged")
    succeeded("to-lora", out, "-o", tmp_path / "lora")
    assert (inspect(tmp_path / "merged").kind, inspect(tmp_path / "lora").kind) == ("merged", "lora")
    assert inspect(tmp_path / "lora").details["options"] == {}
    assert inspect(tmp_path / "lora").details["rank"] == 4
    assert inspect(tmp_path / "merged").details["side"] == "base"


def test_what_is_known_of_every_matrix_is_left_to_json(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    lora = tmp_path / "lora"
    succeeded("to-lora", decomposed(checkpoint("llama")), "-o", lora, "--rank", 2)
    shown = succeeded("inspect", lora).out
    assert "14 values, shown with --json" in shown
    assert "q_proj" not in shown
    assert "q_proj" in succeeded("inspect", lora, "--json").out


def test_an_adapter_of_pefts_says_where_it_belongs(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama"))
    adapter = trained_from(out, tmp_path / "adapter")
    assert inspect(adapter).next[0] == f"svdconvert merge {adapter} -o MERGED --base MODEL"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(out)}))
    found = inspect(adapter)
    assert (found.kind, found.details["rank"], found.details["modules"]) == ("adapter", 4, 14)
    # The command it proposes is the one that works.
    program, *words = shlex.split(found.next[0].replace("LORA", str(tmp_path / "lora")))
    assert program == "svdconvert"
    succeeded(*words)


def test_the_start_of_a_decomposed_directory_is_an_adapter(checkpoint: Build, decomposed: Build) -> None:
    assert inspect(start_of(decomposed(checkpoint("llama")))).kind == "adapter"


def test_what_an_unfinished_run_left(checkpoint: Build, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(checkpoint("llama"), tmp_path / "out", SplitOptions(rank=4), Run(track=stop))
    found = inspect(tmp_path / "out.partial")
    assert found.kind == "unfinished"
    assert found.next == [f"svdconvert decompose {checkpoint('llama')} --rank 4 -o {tmp_path / 'out'}"]
    assert found.details["so_far"] == "1 finished tensor"
    ended = succeeded(*shlex.split(found.next[0])[1:])
    assert "going on from" in ended.err


def test_as_json_and_as_text_it_says_the_same(checkpoint: Build, decomposed: Build) -> None:
    out = decomposed(checkpoint("llama"))
    found = json.loads(succeeded("inspect", out, "--json").out)
    assert found["kind"] == "decomposed"
    assert found["details"]["matrices"] == 14
    text = succeeded("inspect", out).out
    assert f"{out} is a residual base, not a usable model without" in text
    assert f"{found['details']['trained_parameters']:,}" in text
    assert all(command in text for command in found["next"])
    assert "None" not in text


def test_a_directory_of_nothing_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused("inspect", tmp_path, words=[tmp_path, "holds no model weights", "expected model.safetensors"])
