"""The program: what must be set before anything large is imported, and then the command line."""

import os
import sys

from svdconvert.memory import collect_seldom, leave_at_once, return_freed_matrices, use_huge_pages


def main() -> None:
    """The entry point, also of `python -m svdconvert`."""
    collect_seldom()
    return_freed_matrices()
    use_huge_pages()
    # numpy makes threads when torch imports it, which wait busily for products that nobody asks it for.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # huggingface_hub reads these when it is imported: its own words are for programmers, and its bars for
    # terminals.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from svdconvert.cli import app

    with leave_at_once():
        app()


if __name__ == "__main__":
    main()
