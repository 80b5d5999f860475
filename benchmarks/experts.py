"""The time of a training step of a mixture of experts: svdconvert's trainer and PEFT, with the same adapter.

    python benchmarks/experts.py [--experts 32] [--tokens 512] [--steps 5]

Both run a Qwen3-MoE in float32 with adapters of rank 8 on attention and experts: forward, backward and the
optimizer. Steps alternate between the two; the medians are printed, with the losses of the last step.
"""

import argparse
import statistics
import time
from collections.abc import Callable

HIDDEN, INNER, LAYERS, RANK = 512, 256, 4, 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def network(experts: int):  # noqa: ANN201
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=INNER,
    )
    return Qwen3MoeForCausalLM(config)


def with_peft(experts: int):  # noqa: ANN201
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(ATTENTION),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return get_peft_model(network(experts), config)


def with_ours(peft, experts: int):  # noqa: ANN001, ANN201
    """The same network with the same factors, in svdconvert's modules."""
    from svdconvert.linalg.factors import Factors
    from svdconvert.training.model.inject import inject_adapters

    model = network(experts)
    state = {name.replace(".default", ""): value for name, value in peft.state_dict().items()}
    factors = {}
    for name, right in state.items():
        if not name.endswith("lora_A.weight"):
            continue
        left = state[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if ".experts" not in path:
            factors[path] = (Factors(left, right), 1.0)
            continue
        parameter = "gate_up_proj" if path.endswith(".base_layer") else "down_proj"
        lefts = left.reshape(left.shape[0], RANK, experts)
        rights = right.reshape(experts, RANK, -1)
        for expert in range(experts):
            module = f"{path.removesuffix('.base_layer')}.{parameter}[{expert}]"
            factors[module] = (Factors(lefts[:, :, expert], rights[expert]), 1.0)
    inject_adapters(model, factors, frozenset({"lora_A", "lora_B"}))
    return model


def stepper(model, tokens: int) -> Callable[[], float]:  # noqa: ANN001
    """A function that runs one step and returns its loss."""
    import torch

    ids = torch.randint(0, 512, (tokens // 128, 128), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    peft = with_peft(options.experts)
    steps = {
        "ours": stepper(with_ours(peft, options.experts), options.tokens),
        "peft": stepper(peft, options.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for _ in range(options.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] = step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median * 1000:.0f} ms a step, loss {losses[name]:.5f}")
    print(f"ours / peft: {medians['ours'] / medians['peft']:.2f}")


if __name__ == "__main__":
    main()
