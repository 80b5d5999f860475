"""What a user types for a model: a path, org/name[@revision], one file of a repository, or its address."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from svdconvert.checkpoint.safetensors_files import ENDINGS
from svdconvert.errors import CheckpointError, ModelNotFoundError
from svdconvert.hub.auth import endpoint

_FILE = "|".join(re.escape(ending) for ending in ENDINGS)
_REPOSITORY = re.compile(
    rf"(?P<name>\w[\w.-]*/[\w.-]+)(/(?P<file>[^@]+({_FILE})))?(@(?P<revision>[^@]+))?", re.ASCII
)
# Of models that are older than organisations: roberta-base, gpt2. The Hub redirects them.
_LEGACY = re.compile(r"(?P<name>[A-Za-z0-9][\w-]*(\.[0-9][\w-]*)*)(@(?P<revision>[^@]+))?", re.ASCII)
_FOLDER = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)/(?P<folder>[^@]+)(@(?P<revision>[^@]+))?", re.ASCII)
_PUBLIC = ("huggingface.co", "www.huggingface.co", "hf.co")
_PAGES = ("tree", "blob", "resolve")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A local directory or file, or a repository of the Hub at a revision."""

    path: Path | None
    repository: str | None = None
    revision: str | None = None
    file: str | None = None
    """The file of the repository that is the model; None if the model is the repository."""

    @staticmethod
    def parse(text: str) -> "ModelRef":
        """A path if one exists, else a repository, by its name or address.

        Raises ModelNotFoundError if it can be neither, CheckpointError for a folder of a repository.
        """
        if _exists(text):
            return ModelRef(Path(text))
        name = _name_of_address(text) if "://" in text else text
        if match := _REPOSITORY.fullmatch(name):
            return ModelRef(None, match["name"], match["revision"], match["file"])
        if match := _LEGACY.fullmatch(name):
            return ModelRef(None, match["name"], match["revision"])
        if (match := _FOLDER.fullmatch(name)) and ".." not in match["folder"].split("/"):
            raise ModelNotFoundError(
                _folder_sentence(text, match["name"], match["folder"], match["revision"])
            )
        raise ModelNotFoundError(
            f"{text} does not exist and is not an org/name[@revision] of the Hub; check the path"
        )


def is_repository(name: object) -> bool:
    """True for org/name."""
    match = _REPOSITORY.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match["name"] == name


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False


def _name_of_address(text: str) -> str:
    """org/name[/path][@revision] of a page of the Hub. Raises CheckpointError for any other address."""
    address = _split(text)
    hub = _split(endpoint())
    parts = [unquote(part) for part in address.path.split("/") if part]
    known = address.scheme in ("http", "https") and address.netloc in (*_PUBLIC, hub.netloc)
    if not known or not parts or parts[0] in ("datasets", "spaces"):
        raise CheckpointError(
            f"{text[:200]} is not the address of a model on the Hub; download it and give the directory, or "
            "give org/name"
        )
    page = next((number for number, part in enumerate(parts[:3]) if number and part in _PAGES), len(parts))
    name = "/".join([*parts[:page], *parts[page + 2 :]])
    revision = parts[page + 1] if len(parts) > page + 1 else ""
    return f"{name}@{revision}" if revision and revision != "main" else name


def _split(address: str) -> SplitResult:
    """The parts of an address; none if it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _folder_sentence(text: str, repository: str, folder: str, revision: str | None) -> str:
    at = f" --revision {revision}" if revision else ""
    folder = folder.rstrip("/")
    return (
        f"{text} does not exist here, and a folder or file of the repository {repository} is not read by "
        f'itself: download it with `hf download {repository} --include "{folder}/*"{at} --local-dir DIR` and '
        f"give DIR/{folder}, or give org/name[@revision] for the whole repository"
    )
