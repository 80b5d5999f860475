"""What a training run has changed, as its summary says it: means and held-out values, never one batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.output.measurements import read_measurements
from svdconvert.output.sparkline import sparkline

if TYPE_CHECKING:
    from rich.console import Console

    from svdconvert.manifest.schema import Manifest

_FEWEST = 20  # steps from which on the means of the first and the last fifth are compared
_CURVE = 40  # characters
_BLOCKS = "▁█"
_SCORES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


def training_rows(directory: Path, manifest: "Manifest") -> dict[str, object]:
    """Row -> value, read from metrics.jsonl. Raises ArtifactError if that is damaged."""
    logs = [values for _, values in read_measurements(directory / "metrics.jsonl")]
    losses = [log["loss"] for log in logs if "loss" in log]
    evaluations = [log for log in logs if "eval_loss" in log]
    kept = kept_evaluation(evaluations, manifest.options)
    rows: dict[str, object] = {"steps": _steps(len(losses), manifest.options)}
    if kept is not None:
        before = evaluations[0]
        rows["held-out loss"] = f"{before['eval_loss']:.4f} before, {kept['eval_loss']:.4f} after"
        for name in [name for name in kept if name in _SCORES and name in before]:
            rows[_SCORES[name]] = f"{before[name]:.4f} before, {kept[name]:.4f} after"
        if manifest.options.get("keep_best"):
            rows["weights of"] = f"step {kept['step']}, which has the lowest held-out loss"
    rows["training loss"] = _training_loss(losses)
    rows["rate"] = manifest.options["lr"]
    return rows


def kept_evaluation(evaluations: list[dict[str, Any]], options: Any) -> dict[str, Any] | None:
    """The evaluation of the weights that were written; None if nothing was held out."""
    if not evaluations:
        return None
    return min(evaluations, key=lambda log: log["eval_loss"]) if options.get("keep_best") else evaluations[-1]


def _steps(taken: int, options: Any) -> str:
    if options.get("steps") and taken < options["steps"]:
        count = options.get("patience")
        return f"{taken} of {options['steps']}: {count} evaluations without a new lowest held-out loss"
    return str(taken)


def _training_loss(losses: list[float]) -> str | None:
    """Means over many batches: the losses of two batches differ by their rows, whatever was learnt."""
    if not losses:
        return None
    if len(losses) < _FEWEST:
        return f"{_mean(losses):.4f} (mean of {len(losses)} steps)"
    part = len(losses) // 5
    first = _mean(losses[:part])
    last = _mean(losses[-part:])
    return f"{first:.4f} in the first {part} steps, {last:.4f} in the last {part} (means)"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def loss_curve(manifest: "Manifest", console: "Console") -> str | None:
    """The training losses as blocks; None if the terminal cannot show them, or for a single step."""
    training = manifest.training
    values = [value for _, value in training.losses] if training else []
    if len(values) < 2:
        return None
    try:
        _BLOCKS.encode(console.encoding)
    except UnicodeEncodeError:
        return None
    return f"{sparkline(values, _CURVE)}  {min(values):.4f} to {max(values):.4f}"


def is_text_model(manifest: "Manifest") -> bool:
    """True if what was trained writes text, so that one can talk to it."""
    return bool(manifest.options.get("task", "text") == "text")
