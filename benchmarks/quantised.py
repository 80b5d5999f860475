"""4-bit residuals: error ratios, sizes, seconds and losses, against the authors' algorithms in float64.

    python benchmarks/quantised.py ratios MODEL [--ranks 16,32,64,128] [--per-role 1] [--iterations 5]
    python benchmarks/quantised.py cost MODEL --out DIR [--rank 64]
    python benchmarks/quantised.py losses MODEL --data FILE --out DIR [--rank 64] [--steps 50]
    python benchmarks/quantised.py step MODEL --out DIR [--rank 16] [--steps 3] [--tokens 256]

`ratios` prints by how much the error of each start is below that of plain NF4, in the nuclear norm as in
PiSSA (arXiv:2404.02948, section 4) and in the Frobenius norm, as means over a sample of each role. `cost`
compares a 4-bit decomposition with one in bfloat16: seconds, of these the quantising, and bytes. `losses`
trains on the same rows from every start: the held-out loss before and after. `step` trains a LoRA on random
tokens, on MODEL as it is and on its weights in 4 bits: the seconds of a step and the peak resident memory.
Each prints a Markdown table, and the marks that it misses.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import SVDCONVERT, run
from torch import Tensor

from svdconvert.commands.decompose import decompose
from svdconvert.config.options import SplitOptions
from svdconvert.inputs.model import OpenModel, open_model
from svdconvert.layouts.detect import find_layout
from svdconvert.linalg.solver import Solver
from svdconvert.manifest.schema import Manifest, has_manifest
from svdconvert.methods.base import METHODS
from svdconvert.output.measurements import losses
from svdconvert.pipeline.quantised_plan import sampled_per_role
from svdconvert.pipeline.quantised_start import Alternation, QuantStart, quantised_start
from svdconvert.quantization.nf4 import CODE_BOOKS, Rule, encode

PISSA = METHODS.get("pissa")
LARGEST = {False: 0.285, True: 0.262}
"""Most bytes of the tensors without heads and embeddings, in those of bfloat16; True: double quantisation."""
SLOWEST = 2.5
"""Most seconds of one iteration with the last SVD, in those of a decomposition in bfloat16."""
QUANTISING = 0.3
"""Most seconds of quantising and packing, in the same."""
STARTS: dict[str, dict[str, object]] = {
    "qlora": {"method": "lora"},
    "loftq 1": {"quant_start": "loftq", "quant_iterations": 1},
    "loftq 5": {"quant_start": "loftq"},
    "qpissa 1 + svd": {"quant_start": "pissa", "quant_iterations": 1},
    "qpissa 5 + svd": {"quant_start": "pissa"},
}
"""Name -> the options of decompose."""


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("ratios", "cost", "losses", "step"))
    parser.add_argument("model")
    parser.add_argument(
        "--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[16, 32, 64, 128]
    )
    parser.add_argument("--per-role", default="1")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what in ("cost", "losses") and arguments.out is None:
        parser.error(f"{arguments.what} needs --out, a directory for what is written")
    torch.set_num_threads(arguments.threads)
    {"ratios": show_ratios, "cost": show_cost, "losses": show_losses, "step": show_step}[arguments.what](
        arguments
    )


# The authors' algorithms, restated from their papers and run in float64.


def nf4(matrix: Tensor) -> Tensor:
    """Dequantise(quantise(matrix)): blocks of 64 along the rows, the nearest of 16 numbers."""
    flat = torch.nn.functional.pad(matrix.reshape(-1), (0, -matrix.numel() % 64)).reshape(-1, 64)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=1e-38)
    book = CODE_BOOKS["nf4"].double()
    nearest = torch.bucketize(flat / largest, (book[1:] + book[:-1]) / 2)
    return (book[nearest] * largest).reshape(-1)[: matrix.numel()].reshape(matrix.shape)


def top(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def loftq(weight: Tensor, rank: int, iterations: int) -> Tensor:
    """The error W - Q - B A of LoftQ (arXiv:2310.08659, algorithm 1)."""
    update = torch.zeros_like(weight)
    quantised = update
    for _ in range(iterations):
        quantised = nf4(weight - update)
        update = top(weight - quantised, rank)
    return weight - quantised - update


def qpissa(weight: Tensor, rank: int, iterations: int) -> Tensor:
    """The error of QPiSSA (arXiv:2404.02948, algorithm 1), which ends with a quantisation."""
    rest = weight
    update = quantised = torch.zeros_like(weight)
    for _ in range(iterations):
        update = top(rest, rank)
        quantised = nf4(weight - update)
        rest = weight - quantised
    return weight - quantised - update


def ours(weight: Tensor, rank: int, iterations: int, *starts: QuantStart) -> Tensor:
    """The error of what svdconvert stores."""
    plan = Alternation(
        method=PISSA,
        rank=rank,
        scale=1.0,
        solver=Solver("benchmark"),
        dtype=torch.float32,
        read_dtype=torch.bfloat16,
        rule=Rule(),
        starts=starts,
        iterations=iterations,
    )
    found = quantised_start(weight.to(torch.bfloat16), plan)
    return weight - found.base.decode().double() - found.factors.dense(1.0).double()


def show_ratios(arguments: argparse.Namespace) -> None:
    """Print the mean ratios of every start at every rank."""
    many = arguments.iterations
    cases: dict[str, Callable[[Tensor, int], Tensor]] = {
        "LoftQ 1": lambda weight, rank: loftq(weight, rank, 1),
        f"LoftQ {many}": lambda weight, rank: loftq(weight, rank, many),
        "QPiSSA 1": lambda weight, rank: qpissa(weight, rank, 1),
        f"QPiSSA {many}": lambda weight, rank: qpissa(weight, rank, many),
        "svdconvert pissa 1": lambda weight, rank: ours(weight, rank, 1, "pissa"),
        f"svdconvert pissa {many}": lambda weight, rank: ours(weight, rank, many, "pissa"),
        f"svdconvert best {many}": lambda weight, rank: ours(weight, rank, many, "pissa", "loftq"),
    }
    print("| rank | " + " | ".join(cases) + " |\n|---|" + "---|" * len(cases), flush=True)
    sample = list(sampled(arguments.model, arguments.per_role))
    plain = [weight - nf4(weight) for weight in sample]
    nuclear = [norms(error)[0] for error in plain]
    frobenius = [norms(error)[1] for error in plain]
    for rank in arguments.ranks:
        cells = []
        means = {}
        for name, error_of in cases.items():
            found = [norms(error_of(weight, rank)) for weight in sample]
            means[name] = 1 - statistics.mean(one[0] / all_ for one, all_ in zip(found, nuclear, strict=True))
            share = 1 - statistics.mean(one[1] / all_ for one, all_ in zip(found, frobenius, strict=True))
            cells.append(f"{means[name]:.1%} / {share:.1%}")
        print(f"| {rank} | " + " | ".join(cells) + " |", flush=True)
        mark(means[f"svdconvert best {many}"] > means[f"LoftQ {many}"], f"nuclear ratio at rank {rank}")
    print(f"nuclear / Frobenius, means over {len(sample)} matrices, {arguments.per_role} of each role")


def norms(error: Tensor) -> tuple[float, float]:
    """(nuclear norm, Frobenius norm)."""
    return float(torch.linalg.svdvals(error).sum()), float(error.norm())


def sampled(model: str, per_role: str) -> Iterator[Tensor]:
    """Matrices of every role in float64."""
    opened = open_model(model)
    roles = roles_of(opened)
    for name in sorted(sampled_per_role(roles, roles, per_role)):
        yield opened.source.read(name).double()


def roles_of(opened: OpenModel) -> dict[str, str]:
    """Tensor -> role, of all target matrices."""
    infos = opened.source.infos
    _, layout = find_layout(None, opened.config.get("model_type"), str(opened.path), infos)
    return {name: slot.role for name, slot in layout.slots(infos).items()}


def show_cost(arguments: argparse.Namespace) -> None:
    """Print seconds and bytes of decompositions in bfloat16 and in 4 bits."""
    opened = open_model(arguments.model)
    cases: dict[str, dict[str, object]] = {
        "bfloat16": {},
        "nf4, pissa 1 + svd": {"residual_format": "nf4", "quant_start": "pissa", "quant_iterations": 1},
        "nf4, best 5": {"residual_format": "nf4"},
        "nf4, best 5, double": {"residual_format": "nf4", "double_quant": True},
        "nf4, lora": {"residual_format": "nf4", "method": "lora"},
    }
    seconds = quantising_seconds(opened)
    print("| decomposition | seconds | times bfloat16 | bytes without heads | share |\n|---|---|---|---|---|")
    first = Case(0.0, 0)
    for number, (name, values) in enumerate(cases.items()):
        found = decomposition(arguments, f"cost-{number}", values)
        first = first if number else found
        share = found.nbytes / first.nbytes
        times = found.seconds / first.seconds
        print(f"| {name} | {found.seconds:.1f} | {times:.2f} | {found.nbytes:,} | {share:.4f} |", flush=True)
        if number:
            mark(share <= LARGEST["double" in name], f"bytes of {name}")
        if "1 + svd" in name:
            mark(times <= SLOWEST, f"seconds of {name}")
    share = seconds / first.seconds
    print(f"quantising and packing every matrix once: {seconds:.2f} s, {share:.2f} of bfloat16's")
    mark(share <= QUANTISING, "seconds of quantising")


class Case:
    """What a decomposition took and wrote."""

    def __init__(self, seconds: float, nbytes: int) -> None:
        self.seconds = seconds
        self.nbytes = nbytes
        """Of the model's files without heads and embeddings."""


def decomposition(arguments: argparse.Namespace, name: str, values: dict[str, object]) -> Case:
    """Decompose into a directory below OUT."""
    out = arguments.out / name
    started = time.perf_counter()
    options = SplitOptions(rank=arguments.rank, **values)  # type: ignore[arg-type]
    manifest = decompose(arguments.model, out, options)
    return Case(time.perf_counter() - started, body_bytes(out, manifest))


def body_bytes(directory: Path, manifest: Manifest) -> int:
    """Bytes of the model's tensors as stored, without heads and embeddings."""
    from svdconvert.checkpoint.safetensors_files import open_checkpoint

    assert manifest.files
    infos = open_checkpoint(directory).infos
    return sum(info.nbytes for name, info in infos.items() if "lm_head" not in name and "embed" not in name)


def quantising_seconds(opened: OpenModel) -> float:
    """Seconds to quantise and pack every target matrix once."""
    total = 0.0
    for name in roles_of(opened):
        weight = opened.source.read(name)
        started = time.perf_counter()
        encode(weight, Rule())
        total += time.perf_counter() - started
    return total


def show_losses(arguments: argparse.Namespace) -> None:
    """Print held-out losses before and after training from every start."""
    starts = {"bfloat16": {}} | {name: {"residual_format": "nf4"} | values for name, values in STARTS.items()}
    print("| start | held-out loss before | after |\n|---|---|---|")
    for number, (name, values) in enumerate(starts.items()):
        start = arguments.out / f"start-{number}"
        trained = arguments.out / f"trained-{number}"
        decompose(arguments.model, start, SplitOptions(rank=arguments.rank, **values))  # type: ignore[arg-type]
        words = ["train", start, "-o", trained, "--data", arguments.data, "--eval-rows", 32]
        words += ["--steps", arguments.steps, "--batch-size", 2, "--max-length", 128, "--lr", "1e-4"]
        words += ["--prompt-field", "question", "--response-field", "answer"]
        run([*SVDCONVERT, *words], threads=arguments.threads, settling=0.0)
        _, held_out = losses(trained / "metrics.jsonl")
        print(f"| {name} | {held_out[0]:.4f} | {held_out[-1]:.4f} |", flush=True)


def show_step(arguments: argparse.Namespace) -> None:
    """Print the seconds of a step and the peak memory, in bfloat16 and in 4 bits."""
    quantised = arguments.out / "nf4"
    if not has_manifest(quantised):
        options = SplitOptions(rank=arguments.rank, method="lora", residual_format="nf4")
        decompose(arguments.model, quantised, options)
    print("| weights | seconds per step | of the processor | peak memory |\n|---|---|---|---|")
    for name, model in (("bfloat16", arguments.model), ("nf4", quantised)):
        words = [sys.executable, Path(__file__).parent / "training" / "quantised_step.py", model]
        words += [arguments.rank, arguments.steps, arguments.tokens]
        found = json.loads(run(words, threads=arguments.threads).output.splitlines()[-1])
        memory = f"{found['memory'] / 1e6:.0f} MB"
        print(f"| {name} | {found['step']:.2f} | {found['processor']:.2f} | {memory} |", flush=True)


def mark(reached: bool, what: str) -> None:
    """Say which mark is missed."""
    if not reached:
        print(f"MISSED: {what}", flush=True)


if __name__ == "__main__":
    main()
