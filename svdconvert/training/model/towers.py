"""Adapters in the towers of a model, which see or hear for it: they are trained only by rows with images."""

from collections.abc import Iterable

from svdconvert.errors import DataError
from svdconvert.manifest.schema import Matrix
from svdconvert.models.roles import TOWERS
from svdconvert.training.data.dataset import DataSplits


def adapts_tower(matrices: Iterable[Matrix]) -> bool:
    """True if one of the adapted matrices is in a tower."""
    return any(_tower(matrix) for matrix in matrices)


def untrained_towers(matrices: Iterable[Matrix], splits: DataSplits) -> str | None:
    """A sentence about the adapted matrices that these rows do not train; None if they train all.

    Raises DataError if there are rows that would train nothing.
    """
    towers = [_tower(matrix) for matrix in matrices]
    texts = sum(example.images is None for example in splits.train)
    seeing = towers.count("vision")
    idle = towers.count("audio") + (0 if splits.has_images else seeing)
    if "" not in towers and (texts or not seeing):
        raise DataError(
            f"{texts} of the {len(splits.train)} rows have no image, and only towers are adapted, so these "
            "rows would train nothing; leave them out, or decompose with --targets all-linear,vision"
        )
    if idle == 0:
        return None
    return (
        f"{idle} of the {len(towers)} adapted matrices are in towers that no row reaches, so they stay as "
        "they start: give rows with images, or leave the towers out of --targets"
    )


def _tower(matrix: Matrix) -> str:
    first = matrix.role.partition(".")[0]
    return first if first in TOWERS else ""
