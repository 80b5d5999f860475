"""Several adapters or checkpoints of a quantised base become a plain model that transformers loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from svdconvert import MergeOptions, Run, SplitOptions, combine, decompose, merge
from svdconvert.errors import RecipeError
from svdconvert.inputs.model import open_model
from tests.quantization.checkpoints import plain, quantise
from tests.quantization.test_gguf import write

RUN = Run(device="cpu", threads=1)


@pytest.fixture(params=["gguf", "fp8-block"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "gguf":
        return write(tmp_path / "base.gguf")
    return quantise(plain(tmp_path / "plain"), tmp_path / "base", request.param)


def assert_is_plain(directory: Path, base: Path) -> None:
    """Transformers loads the decoded values, without a word of quantisation."""
    source = open_model(str(base)).source
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert getattr(model.config, "quantization_config", None) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.read(name)), name


def test_untrained_adapters_are_merged_into_the_decoded_model(base: Path, tmp_path: Path) -> None:
    adapters = [tmp_path / "q", tmp_path / "v"]
    for adapter in adapters:
        decompose(base, adapter, SplitOptions(rank=2, method="lora", targets=f"attn.{adapter.name}"), RUN)
    merge(adapters, tmp_path / "merged", run=RUN, base=str(base))
    assert_is_plain(tmp_path / "merged", base)
    with pytest.raises(RecipeError, match="--keep-format is for a single adapter"):
        merge(adapters, tmp_path / "kept", MergeOptions(keep_format=True), RUN, base=str(base))


def test_gguf_files_are_combined_into_a_plain_model(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf")
    combine([base, base], tmp_path / "out", run=RUN)
    assert_is_plain(tmp_path / "out", base)
