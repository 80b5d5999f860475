"""The progress of downloads and uploads, without huggingface_hub's own bars."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svdconvert.config.progress import Progress, tracking
from svdconvert.hub.transfers import Transfer, upload_followed
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

FOLLOWED = """
from huggingface_hub.utils import are_progress_bars_disabled
from svdconvert import Run, SplitOptions, decompose, push
seen = []
def track(progress):
    if progress.phase in ("fetch", "upload"):
        seen.append([progress.phase, progress.done, progress.total, progress.unit])
before = are_progress_bars_disabled()
decompose("org/model", "out", SplitOptions(rank=4), Run(track=track))
push("out", "alice/out", run=Run(track=track))
result = [seen, before == are_progress_bars_disabled()]
"""


def test_fetch_and_upload_report_their_bytes_up_to_the_last(
    hub: Hub, alice: Visitor, checkpoint: Build
) -> None:
    model = checkpoint("llama")
    hub.create("org/model", model)
    seen, unchanged = alice.runs(FOLLOWED)  # type: ignore[misc]
    assert unchanged
    fetched = [entry for entry in seen if entry[0] == "fetch"]
    size = sum(path.stat().st_size for path in model.iterdir())
    # The small files come first, and the weights when it is known that they can be used.
    starts = [entry for entry in fetched if entry[1] == 0]
    ends = [entry for entry in fetched if entry[1] == entry[2]]
    assert sum(total for _, _, total, _ in starts) == sum(done for _, done, _, _ in ends) == size
    assert {unit for *_, unit in fetched} == {"bytes"}
    uploaded = [entry for entry in seen if entry[0] == "upload"]
    done = [entry[1] for entry in uploaded]
    total = uploaded[0][2]
    assert done == sorted(done) and done[0] == 0 and done[-1] == total
    # The weights are sent as they are read, and not counted at the end only.
    weights = (alice.home / "out" / "model.safetensors").stat().st_size
    assert done[-2] >= weights


def test_an_exception_of_the_callback_is_raised_where_the_command_runs() -> None:
    def fail(progress: Progress) -> None:
        raise ValueError("a broken display")

    with tracking(fail, "push"):
        transfer = Transfer("upload", 10, "org/name")
    transfer.add(5)  # as in a thread of huggingface_hub, which would take an exception for a broken network
    with pytest.raises(ValueError, match="a broken display"):
        transfer.finish()


def test_uploads_through_xet_are_followed_by_names_that_this_huggingface_hub_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Xet itself is not reached: huggingface_hub's own function is run with a session that only counts."""
    from huggingface_hub import CommitOperationAdd, _commit_api
    from huggingface_hub.utils import _xet

    seen: list[Progress] = []

    class Session:
        @contextmanager
        def new_upload_commit(self, *, progress_callback: Any, **_: Any) -> Any:
            yield SimpleNamespace(start_upload_file=lambda *_, **__: None)
            progress_callback(SimpleNamespace(total_bytes_completed=7), {})

    monkeypatch.setattr(_xet, "get_xet_session", Session)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"0123456789")
    with tracking(seen.append, "push"), upload_followed("org/name", 10) as count:
        operation = count(CommitOperationAdd("weights.bin", str(file)))
        assert operation.upload_info.sha256  # so that it need not come from Xet
        _commit_api._upload_xet_files(
            additions=[operation], repo_type="model", repo_id="org/name", headers={}, revision="main"
        )
    assert [(progress.phase, progress.done, progress.total) for progress in seen] == [
        ("upload", 0, 10),
        ("upload", 7, 10),
        ("upload", 10, 10),
    ]
