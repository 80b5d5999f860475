"""Where the user says that the parts of an adapter are."""

from dataclasses import dataclass

NO_INIT = "none"
"""What `--init` says of an adapter that started at zero, on the untouched base."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Overrides of the locations in a manifest; None leaves the manifest's own.

    They override a location, never the identity of the weights found there.
    """

    base: str | None = None
    """The untouched model."""
    residual: str | None = None
    """What decompose wrote, or a plain residual base."""
    init: str | None = None
    """The initial adapter, or "none"."""
    stream: bool = False
    """Read the weights of Hub models by range requests."""
