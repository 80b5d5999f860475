"""How fast RWKV-6 runs and trains on this CPU: by chunks, token by token, and in the rwkv package.

    python benchmarks/rwkv6.py --threads 1
    python benchmarks/rwkv6.py --train RWKV-x060.pth     # steps per minute on your own model

The operator is timed alone and in a random model of two layers (`--tokens`, `--width`), forward and
forward with backward. The package runs in a separate process, because importing it changes settings of torch;
it computes forward only. Times are medians of CPU time. The forms run in turn, and each timed run directly
follows an untimed one of the same form, because the first run after another form's also has to take back the
memory that was returned to the system.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from svdconvert.checkpoint.renamed import as_family
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.layouts.base import LAYOUTS
from svdconvert.models.rwkv6 import Rwkv6, load
from svdconvert.models.rwkv6_tensors import Sizes
from svdconvert.models.wkv6 import EXACT, WIDE, Form, token_by_token

FORMS: dict[str, Form] = {"token by token": token_by_token, "chunks (CPU)": WIDE, "chunks (GPU)": EXACT}
HEAD = 64

PACKAGE = """
import os, sys, time
os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="0")
import torch
torch.set_num_threads(int(sys.argv[2]))
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens, times = [token % 250 for token in range(int(sys.argv[3]))], []
for _ in range(int(sys.argv[4]) + 2):
    start = time.process_time()
    model.forward(tokens, None)
    times.append(time.process_time() - start)
print("seconds", sorted(times[2:])[len(times[2:]) // 2])
"""


def main() -> None:
    """Time what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--train", type=Path, help="Train this model's matrices for a minute instead.")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.train:
        train(asked.train)
        return
    print(f"T = {asked.tokens}, C = {asked.width}, {asked.threads} threads; milliseconds")
    report("the operator alone", operators(asked.tokens, asked.width), asked.repeat)
    model = random_model(asked.width)
    report("two layers", models(model, asked.tokens), asked.repeat)
    seconds = package(model, asked.threads, asked.tokens, asked.repeat)
    print(
        f"    {'the rwkv package':16} {seconds * 1e3:8.1f}"
        if seconds
        else "    the rwkv package is not installed"
    )


Timed = Callable[[bool], None]
"""Runs once, with the backward pass or without it."""


def report(title: str, works: dict[str, Timed], repeat: int) -> None:
    """Median times of each, and how many times slower the recurrence is."""
    print(f"{title:20} {'forward':>8} {'and backward':>14}")
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(repeat + 1):
        for name, work in works.items():
            for backward in (False, True):
                work(backward)
                start = time.process_time()
                work(backward)
                times.setdefault((name, backward), []).append(time.process_time() - start)
    found = {place: statistics.median(seconds[1:]) for place, seconds in times.items()}
    for name in works:
        cells = []
        for backward in (False, True):
            mine = found[name, backward]
            cells.append(f"{mine * 1e3:8.1f} ({found['token by token', backward] / mine:.1f}x)")
        print(f"    {name:16} {'  '.join(cells)}")


def operators(tokens: int, width: int) -> dict[str, Timed]:
    """The recurrence of one layer, on random inputs."""
    shape = (1, width // HEAD, tokens, HEAD)
    r, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    a = (-torch.exp(torch.rand(shape) * 6 - 5)).requires_grad_()
    u = torch.randn(shape[1], HEAD, requires_grad=True)
    state = torch.zeros(1, shape[1], HEAD, HEAD)

    def work(form: Form) -> Timed:
        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                y, _ = form(r, k, v, a, u, state)
            if backward:
                y.sum().backward()

        return run

    return {name: work(form) for name, form in FORMS.items()}


def random_model(width: int) -> Rwkv6:
    """Two layers over bytes."""
    feed_forward = int(width * 3.5) // 32 * 32
    model = Rwkv6(Sizes(2, 256, width, width // HEAD, HEAD, 32, 64, feed_forward))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model


def models(model: Rwkv6, tokens: int) -> dict[str, Timed]:
    """The whole model, with every form."""
    ids = torch.arange(tokens)[None] % 250

    def work(form: Form) -> Timed:
        def run(backward: bool) -> None:
            with torch.set_grad_enabled(backward), model.computing(form):
                logits: Tensor = model(ids).logits
            if backward:
                cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
                model.zero_grad()

        return run

    return {name: work(form) for name, form in FORMS.items()}


def package(model: Rwkv6, threads: int, tokens: int, repeat: int) -> float | None:
    """Seconds of the rwkv package for the same model; None if it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(model.state_dict(), path)
        words = [sys.executable, "-c", PACKAGE, str(path), str(threads), str(tokens), str(repeat)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if "No module named 'rwkv'" in done.stderr:
        return None
    return float(done.stdout.split("seconds ")[1])


def train(path: Path) -> None:
    """Train the matrices on this repository's own texts for a minute, and print the loss."""
    family = LAYOUTS.get("rwkv6-blinkdl").family
    assert family is not None
    model = load(as_family(open_checkpoint(path), family.rules, str(path)), torch.float32)
    matrices = [value for name, value in model.named_parameters() if value.dim() == 2 and "time" not in name]
    model.requires_grad_(False)
    for matrix in matrices:
        matrix.requires_grad_()
    root = Path(__file__).resolve().parents[1]
    data = b"".join(file.read_bytes() for file in sorted(root.glob("docs/**/*.md")))
    rows = torch.frombuffer(bytearray(data[: len(data) // 257 * 257]), dtype=torch.uint8).long().view(-1, 257)
    optimizer = torch.optim.AdamW(matrices, 1e-3)
    start = time.perf_counter()
    step = 0
    while time.perf_counter() - start < 60:
        batch = rows[torch.arange(step * 8, step * 8 + 8) % len(rows)]
        loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"{time.perf_counter() - start:5.0f} s  step {step:4}  loss {loss.item():.3f}", flush=True)
        step += 1


if __name__ == "__main__":
    main()
