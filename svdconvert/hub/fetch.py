"""The door in: a model reference becomes a local directory."""

from dataclasses import dataclass
from pathlib import Path

from svdconvert.errors import CheckpointError
from svdconvert.hub.reference import ModelRef

# Weights in safetensors, and what loaders read beside them.
_SIDECARS = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "USE_POLICY*", "*_init/*"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model on this machine, and where it came from."""

    path: Path
    location: str
    """The absolute path, or org/name."""
    revision: str | None = None
    """The commit, for a model of the Hub."""

    @property
    def hub_id(self) -> str | None:
        """org/name for a model of the Hub."""
        return self.location if self.revision else None


def fetch(model: str) -> Snapshot:
    """The directory of `model`, downloaded into the Hub's cache where it is not local.

    Raises CheckpointError where the Hub does not have it or cannot be reached.
    """
    reference = ModelRef.parse(model)
    if reference.path is not None:
        return Snapshot(reference.path, str(reference.path.absolute()))
    assert reference.repository is not None
    path = _download(reference.repository, reference.revision)
    return Snapshot(path, reference.repository, path.name)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    at = f"{repository}@{revision}" if revision else repository
    try:
        wanted = [_weights(repository, revision), *_SIDECARS]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} is no local directory, not in the local cache, and the Hub is out of reach; "
            "mend the path or connect"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{at} is no local directory and cannot be fetched from the Hub: {_first_line(error)}"
        ) from error


def _weights(repository: str, revision: str | None) -> str:
    """Which of the repository's weights are fetched: safetensors where there are any."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = list_repo_files(repository, revision=revision)
    except HfHubHTTPError:
        raise
    except Exception:  # out of reach, in whatever way its HTTP client says so: the cache may have it
        return "*.safetensors"
    return "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
