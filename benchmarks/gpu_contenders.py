"""One run of one program on a GPU, which times itself. Started by benchmarks/gpu.py.

python benchmarks/gpu_contenders.py NAME OPTIONS-AS-JSON
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WARM = 3
"""Number of first training steps that are not counted."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Print the seconds after the imports, the seconds of a training step if there are any, and memory."""
    contender: Callable[..., Callable[[], list[float]]] = globals()[sys.argv[1]]
    work = contender(SimpleNamespace(**json.loads(sys.argv[2])))
    torch.zeros(1, device="cuda")
    started = time.perf_counter()
    marks = work()
    torch.cuda.synchronize()
    steps = sorted(after - before for before, after in zip(marks[WARM:], marks[WARM + 1 :], strict=False))
    host = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    print()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "step": steps[len(steps) // 2] if steps else None,
                "gpu": torch.cuda.max_memory_allocated(),
                "locked": host.get("allocated_bytes.peak", 0),
            }
        )
    )


def decompose(options: Any) -> Callable[[], list[float]]:
    """svdconvert's decomposition."""
    from svdconvert import Run, SplitOptions
    from svdconvert import decompose as run_decompose

    def work() -> list[float]:
        split = SplitOptions(rank=options.rank, tol=options.tol)
        run_decompose(options.model, options.out, split, Run(device="cuda"))
        return []

    return work


def peft_decompose(options: Any) -> Callable[[], list[float]]:
    """The recipe of PEFT's documentation, with the model on the GPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def work() -> list[float]:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).cuda()
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            init_lora_weights=options.start,
            target_modules=PROJECTIONS,
        )
        adapted = get_peft_model(base, config)
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(f"{options.out}/pissa_init")
        adapted.unload().save_pretrained(options.out)
        return []

    return work


def merge(options: Any) -> Callable[[], list[float]]:
    """svdconvert's merge of a LoRA into its base."""
    from svdconvert import Run
    from svdconvert import merge as run_merge

    def work() -> list[float]:
        run_merge(options.adapter, options.out, base=options.model, run=Run(device="cuda"))
        return []

    return work


def peft_merge(options: Any) -> Callable[[], list[float]]:
    """PEFT's merge_and_unload on the GPU."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> list[float]:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).cuda()
        PeftModel.from_pretrained(base, options.adapter).merge_and_unload().save_pretrained(options.out)
        return []

    return work


def train(options: Any) -> Callable[[], list[float]]:
    """svdconvert's trainer."""
    from svdconvert import Run, SplitOptions, TrainOptions
    from svdconvert import train as run_train
    from svdconvert.training.optim.loop import StepLog

    marks: list[float] = []

    def watch(log: Any, steps: int) -> None:
        if isinstance(log, StepLog):
            marks.append(time.perf_counter())

    def work() -> list[float]:
        plan = TrainOptions(
            data=options.data,
            steps=options.steps,
            batch_size=options.batch,
            max_length=options.length,
            lr=1e-4,
            device="cuda",
            gradient_checkpointing=options.recompute,
        )
        split = SplitOptions(method="lora", rank=16)
        run_train(options.model, options.out, plan, Run(), split=split, watch=watch)
        return marks

    return work


def peft_train(options: Any) -> Callable[[], list[float]]:
    """PEFT's LoRA under the Trainer of transformers, with bf16 autocast."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    marks: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "loss" in logs:
                marks.append(time.perf_counter())

    def work() -> list[float]:
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS))
        arguments = TrainingArguments(
            f"{options.out}/checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-4,
            bf16=True,
            gradient_checkpointing=options.recompute,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=_rows(options), callbacks=[Watch()]).train()
        model.save_pretrained(options.out)
        return marks

    return work


def _rows(options: Any) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = []
    for line in Path(options.data).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"][: options.length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return rows


if __name__ == "__main__":
    main()
