"""The files of a data set of the Hub, downloaded with their progress before `datasets` reads them."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from svdconvert.config.progress import is_followed
from svdconvert.hub.auth import find_token, hub_api
from svdconvert.hub.transfers import follow_files

_SCHEME = "hf://datasets/"


def fetch_data_files(name: str, addresses: Iterable[str]) -> None:
    """Download the files of the data set `name` at these addresses of `datasets` into the Hub's cache.

    Does nothing if nobody follows the command: `datasets` downloads them too, and reports nothing.
    """
    from huggingface_hub import HfFileSystem

    own = [address for address in addresses if address.startswith(_SCHEME)]
    if not own or not is_followed():
        return
    api = hub_api()
    files = HfFileSystem(endpoint=api.endpoint, token=find_token())
    found: list[Any] = [files.resolve_path(address) for address in own]
    by_revision: dict[tuple[str, str], list[str]] = {}
    for path in found:
        by_revision.setdefault((path.repo_id, path.revision), []).append(path.path_in_repo)
    for (repository, revision), paths in by_revision.items():
        infos = api.get_paths_info(repository, paths, revision=revision, repo_type="dataset")
        sizes = {info.path: int(getattr(info, "size", 0)) for info in infos}
        download = partial(api.hf_hub_download, repository, repo_type="dataset", revision=revision)
        follow_files(name, sizes, download)
