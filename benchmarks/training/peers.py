"""PEFT's model under a trainer of transformers or TRL. Needs no svdconvert.

With TRL it is started by benchmarks/train.py in TRL's own virtual environment:

python peers.py OPTIONS-AS-JSON
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from marks import Mark, report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

LR = 1e-4


def peft_network(options: Any) -> nn.Module:
    """The model with PEFT's LoRA on all linear layers, or its PiSSA; PEFT has no SORSA."""
    from peft import LoraConfig, get_peft_model

    dtype = "auto" if options.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules="all-linear",
        init_lora_weights="pissa_niter_4" if options.method == "pissa" else True,
    )
    return get_peft_model(model, config)


def train_with(
    trainer: Any, config: Any, options: Any, batches: list[dict[str, Tensor]], **more: Any
) -> list[Mark]:
    """Train on the given batches, one a step, and return when the steps ended."""
    marks: list[Mark] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "loss" in logs:
                marks.append(Mark(float(logs["loss"])))

    class Loop(trainer):
        def get_train_dataloader(self) -> Any:
            return batches

    arguments = config(
        "/nowhere",
        max_steps=len(batches),
        learning_rate=LR,
        bf16=options.precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    Loop(peft_network(options), arguments, callbacks=[Watch()], **more).train()
    return marks


def main() -> None:
    """Train with TRL's SFTTrainer on the batches that step.py saved."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    options = SimpleNamespace(**json.loads(sys.argv[1]))
    batches = torch.load(options.batches)
    rows = Dataset.from_dict({"input_ids": [row.tolist() for batch in batches for row in batch["input_ids"]]})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    report(
        train_with(SFTTrainer, SFTConfig, options, batches, train_dataset=rows, processing_class=tokenizer)
    )


if __name__ == "__main__":
    main()
