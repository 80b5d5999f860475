"""Locations of an adapter's base, residual and initial adapter, as given by the user."""

from dataclasses import dataclass

NO_INIT = "none"
"""Value of `--init` for an adapter that started at zero, on the untouched base."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Locations that override those in a manifest; None keeps the manifest's.

    The weights at a given location must still be those that the manifest identifies.
    """

    base: str | None = None
    """The untouched model."""
    residual: str | None = None
    """What decompose wrote, or a plain residual base."""
    init: str | None = None
    """The initial adapter, or "none"."""
    stream: bool = False
    """Read the weights of Hub models by range requests."""
    trust_remote_code: bool = False
    """Let transformers run the code in the model's repository."""
