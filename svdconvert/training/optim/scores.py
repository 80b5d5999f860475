"""How good a classifier or regressor is, by scikit-learn and scipy."""

from collections.abc import Sequence
from importlib.util import find_spec
from math import isfinite

from svdconvert.errors import MissingPackageError


def require_scores() -> None:
    """Raise MissingPackageError where the libraries are not installed."""
    if find_spec("sklearn") is None:
        raise MissingPackageError('the scores need scikit-learn: pip install "svdconvert[scores]"')


def class_scores(labels: Sequence[float], guesses: Sequence[float], classes: int) -> dict[str, float]:
    """Accuracy; F1, of the second of two classes as GLUE has it, else the mean over classes; Matthews'.

    Matthews' correlation is 0 where there is a single class in all.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    two = classes == 2
    f1 = f1_score(labels, guesses, average="binary" if two else "macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1),
        "matthews": float(matthews_corrcoef(labels, guesses)) if len({*labels, *guesses}) > 1 else 0.0,
    }


def number_scores(labels: Sequence[float], guesses: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side does not vary."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(labels)) < 2 or len(set(guesses)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    found = {"pearson": float(pearsonr(labels, guesses)[0]), "spearman": float(spearmanr(labels, guesses)[0])}
    return {name: value if isfinite(value) else 0.0 for name, value in found.items()}
