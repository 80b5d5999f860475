"""Record what the README and the notebook show, by running their commands and cells on SmolLM2.

    python examples/record.py readme
    python examples/record.py notebook

`make outputs` does both. The model is made once by recipes/demo/smollm2.py and kept in .cache.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"
DEMO = REPOSITORY / "recipes" / "demo"
ROWS = DEMO / "gsm8k-train.jsonl"
CHAIN = re.compile(r"(<!-- chain -->\n```\n)(.*?)(```\n<!-- /chain -->)", re.DOTALL)
PROGRESS = re.compile(
    r"svdconvert: (?:fetch|check|read rows|load weights|held-out|sample|decompose|train|to-lora|merge) [0-9]"
)


def main(what: str) -> None:
    """Record one of the two."""
    demo = runpy.run_path(str(DEMO / "smollm2.py"))
    model = demo["ensure_smollm2"](demo["cache_dir"]() / "smollm2-135m")
    {"readme": record_readme, "notebook": record_notebook}[what](model)


def record_readme(model: Path) -> None:
    """Run the commands of the chain, and put their output below each."""
    text = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(model, Path(home) / "smollm2")
        shutil.copy(ROWS, Path(home) / "train.jsonl")
        shown = "".join(run_chain(commands_of(text), Path(home)))
    README.write_text(CHAIN.sub(lambda found: found[1] + shown + found[3], text), encoding="utf-8")


def commands_of(text: str) -> list[str]:
    """The commands of the chain in the README."""
    found = CHAIN.search(text)
    if found is None:
        raise ValueError(f"{README} has no chain between its two marks")
    return re.findall(r"^\$ (svdconvert .+)$", found[2], re.MULTILINE)


def run_chain(commands: list[str], home: Path) -> Iterator[str]:
    """Yield every command, followed by what it prints into 88 columns. In that `home` is called /home/me.

    The lines that say every minute how far a command is are left out.
    """
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "COLUMNS": "88", "PYTHONPATH": path}
    for command in commands:
        yield f"$ {command}\n"
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        lines = done.stdout.replace(str(home.resolve()), "/home/me").splitlines()
        yield "".join(f"{line.rstrip()}\n" for line in lines if not PROGRESS.match(line))


def record_notebook(model: Path) -> None:
    """Execute the notebook, and keep what it printed and drew."""
    import nbformat

    notebook = executed(model)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":  # standard error has the progress bars of other libraries
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)


def executed(model: Path) -> Any:
    """The notebook after its cells ran on `model` and the demo's rows.

    Raises nbclient's CellExecutionError, with the traceback, if a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MODEL": str(model), "DATA": str(ROWS), "PYTHONPATH": path}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True)
    client.execute(env=environment)
    return notebook


if __name__ == "__main__":
    if sys.argv[1:] not in (["readme"], ["notebook"]):
        sys.exit("usage: python examples/record.py readme|notebook")
    main(sys.argv[1])
