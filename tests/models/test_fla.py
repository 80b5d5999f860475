"""flash-linear-attention reads what convert writes for it: its names, and its own code where it is installed.

The code runs on Triton's interpreter, which needs no GPU.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.test_rwkv6 import TOKENS, ids, opened
from tests.program import succeeded
from tests.rwkv6 import random_model, save

# Without a GPU the tuning of kernels has nothing to time. Up to 64 tokens take the one kernel of the
# recurrence that the interpreter can run.
PROGRAM = """
import json, sys
import torch
from triton.runtime.autotuner import Autotuner
Autotuner._bench = lambda *_, **__: [1.0, 1.0, 1.0]
from fla.models import RWKV6ForCausalLM
model, info = RWKV6ForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype=torch.float32)
tokens, logits = torch.tensor([json.loads(sys.argv[3])]), []
for epsilon in (model.model.layers[0].attn.g_norm.eps, 64e-5):
    for layer in model.model.layers:
        layer.attn.g_norm.eps = epsilon
    with torch.no_grad():
        logits.append(model.eval()(tokens, use_cache=False).logits[0])
torch.save(logits, sys.argv[2])
print(json.dumps({name: sorted(map(str, found)) for name, found in info.items()}))
"""

LAYER = """
attn_norm.weight 96|attn_norm.bias 96|attn.x_bias 5 96|attn.bonus 3 32|attn.x_proj.0.mu 96|
attn.x_proj.0.linear.weight 25 96|attn.x_proj.2.weight 96 25|attn.r_proj.linear.weight 96 96|
attn.w_proj.linear.lora.0.weight 6 96|attn.w_proj.linear.lora.2.weight 96 6|attn.w_proj.linear.lora.2.bias 96|
attn.k_proj.linear.weight 96 96|attn.v_proj.linear.weight 96 96|attn.g_proj.linear.weight 96 96|
attn.g_norm.weight 96|attn.g_norm.bias 96|attn.o_proj.weight 96 96|ffn_norm.weight 96|ffn_norm.bias 96|
ffn.key.mu 96|ffn.key.linear.weight 320 96|ffn.value.weight 96 320|ffn.receptance.mu 96|
ffn.receptance.linear.weight 96 96
"""
OTHERS = """
embeddings.weight 61 96|layers.0.pre_norm.weight 96|layers.0.pre_norm.bias 96|norm.weight 96|norm.bias 96
"""


def test_names_and_shapes_are_those_of_flash_linear_attention(tmp_path: Path) -> None:
    """The state dict of RWKV6ForCausalLM in version 0.6.0, for the config.json that convert writes."""
    path = save(random_model(width=96), tmp_path / "m.pth", torch.float32)
    succeeded("convert", path, "-o", tmp_path / "fla", "--layout", "fla")
    found = {
        name: list(tensor.shape) for name, tensor in load_file(tmp_path / "fla" / "model.safetensors").items()
    }
    entries = [f"model.layers.{n}.{entry}" for n in range(2) for entry in LAYER.replace("\n", "").split("|")]
    entries += [f"model.{entry}" for entry in OTHERS.strip().split("|")] + ["lm_head.weight 61 96"]
    assert found == {name: list(map(int, sizes)) for name, *sizes in map(str.split, entries)}


@pytest.mark.skipif(
    find_spec("fla") is None, reason="needs flash-linear-attention and triton, which are made for GPUs"
)
def test_flash_linear_attention_loads_every_tensor_and_gives_our_logits(tmp_path: Path) -> None:
    path = save(random_model(width=96), tmp_path / "m.pth", torch.float32)
    succeeded("convert", path, "-o", tmp_path / "fla", "--layout", "fla")
    given = [str(tmp_path / "fla"), str(tmp_path / "logits.pt"), json.dumps(TOKENS[:20])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-c", PROGRAM, *given]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout.splitlines()[-1])
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert not any(info.values())
    with torch.no_grad():
        wanted = opened(path)(ids(TOKENS[:20])).logits[0]
    loaded, mended = torch.load(tmp_path / "logits.pt")
    assert (mended - wanted).abs().max() < 1e-5
    # What convert warns of: its config.json has no place for the epsilon.
    assert (loaded - wanted).abs().max() > 1e-3
