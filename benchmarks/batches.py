"""Whether batches make small matrices faster: the parts of a decomposition, one by one and batched.

python benchmarks/batches.py [--threads 2] [--repeat 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

# (rows, columns, block, matrices): a toy expert, one of Qwen3-30B-A3B, one of Qwen3-235B-A22B.
SHAPES = ((96, 256, 24, 64), (768, 2048, 80, 8), (1536, 4096, 80, 4))


def main() -> None:
    """Print one row for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("matrices", "product", "QR", "eigh of the core", title="One by one / batched, milliseconds")
    for rows, columns, block, count in SHAPES:
        weights = torch.randn(count, rows, columns)
        starts = torch.randn(count, columns, block)
        images = weights @ starts
        cores = starts.mT @ starts
        cells = [
            both(torch.matmul, (weights, starts), arguments.repeat),
            both(torch.linalg.qr, (images,), arguments.repeat),
            both(torch.linalg.eigh, (cores,), arguments.repeat),
        ]
        table.add_row(f"{count} of {rows} x {columns}", *cells)
    Console().print(table)


def both(function: Callable[..., object], batches: tuple[torch.Tensor, ...], repeat: int) -> str:
    """Medians of the function on each matrix, and on all at once."""

    def singly() -> None:
        for index in range(len(batches[0])):
            function(*(batch[index] for batch in batches))

    return f"{median(singly, repeat):.2f} / {median(lambda: function(*batches), repeat):.2f}"


def median(call: Callable[[], object], repeat: int) -> float:
    """Milliseconds of one call, after a warm-up."""
    call()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
