"""What a training step saves for the backward pass: LoRA-FA, LoRA, and PEFT's LoRA, at the same shapes.

    python benchmarks/activations.py [--layers 4] [--tokens 2048]

Every kind runs in a separate process: a Llama-shaped model in bfloat16, adapters of rank 16 on all linear
layers, one forward and one backward pass. "kept" is what autograd saves in addition to parameters and
buffers, each storage counted once; peak is the anonymous memory of the whole process.
"""

import argparse
import sys

from measure import run

KINDS = ("peft lora", "lora", "lora-fa")
HIDDEN, INNER, RANK = 1024, 2816, 16


def step(kind: str, layers: int, tokens: int) -> None:
    """Run one step of one kind and print the number of saved bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = with_peft(model) if kind == "peft lora" else with_ours(model, kind)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 512, (tokens // 512, 512))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    print(sum(kept.values()))


def with_peft(model):  # noqa: ANN001, ANN201
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))


def with_ours(model, method: str):  # noqa: ANN001, ANN201
    import torch

    from svdconvert.linalg.factors import Factors
    from svdconvert.methods.base import METHODS
    from svdconvert.training.model.inject import inject_adapters

    adapters = {
        path: (Factors(torch.zeros(layer.out_features, RANK), torch.randn(RANK, layer.in_features)), 1.0)
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and path != "lm_head"
    }
    inject_adapters(model, adapters, METHODS.get(method).trains)
    return model


def main() -> None:
    """Measure every kind and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kind", choices=KINDS)
    chosen = parser.parse_args()
    if chosen.kind:
        step(chosen.kind, chosen.layers, chosen.tokens)
        return
    print(f"{'':12}{'kept, MB':>10}{'peak, MB':>10}")
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind]
        command += ["--layers", str(chosen.layers), "--tokens", str(chosen.tokens)]
        done = run(command, threads=2)
        print(f"{kind:12}{int(done.output.split()[-1]) / 1e6:10.0f}{done.memory / 1e6:10.0f}")


if __name__ == "__main__":
    main()
