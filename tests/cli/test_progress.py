"""The line of progress, the lines of a log, and what `Run.track` is told."""

import re
import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from svdconvert.cli import progress, terminal
from svdconvert.cli.progress_line import Meter, progress_text
from svdconvert.config.progress import Progress

NAME = "model.layers.3.self_attn.q_proj.weight"
FILE = "model-00001-of-00005.safetensors"
BYTES = Progress("decompose", 200_000_000, 600_000_000, "bytes", {"name": NAME, "file": FILE})
STEPS = Progress(
    "train",
    120,
    200,
    "steps",
    {"loss": 1.93451, "held_out": 2.01234, "lr": 1.8e-4, "tokens_per_second": 812.3},
)
WIDTHS = (20, 40, 60, 80, 120, 200)


def meter(done: int) -> Meter:
    """A meter after ten seconds of steady work."""
    made = Meter()
    for second in range(11):
        made.advance(float(second), done * second // 10)
    return made


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", [BYTES, STEPS])
def test_a_line_fits_the_terminal_and_no_number_in_it_is_cut(report: Progress, width: int) -> None:
    wide = progress_text(report, meter(report.done), 10.0, 300)
    line = progress_text(report, meter(report.done), 10.0, width)
    assert len(line) <= max(width, len("decompose 200.0/600.0 MB") if width > 20 else width)
    if width > 30:
        numbers = re.findall(r"[\d.,:/e-]*\d", line.split(NAME[:6])[0])
        assert len(numbers) >= 2
        assert [number for number in numbers if number not in re.findall(r"[\d.,:/e-]*\d", wide)] == []


def test_a_wide_line_has_amount_rate_time_left_and_name() -> None:
    line = progress_text(BYTES, meter(BYTES.done), 10.0, 200)
    assert line.startswith("decompose ━")
    assert line.endswith(f"200.0/600.0 MB  0:20 left  20.0 MB/s  {NAME} {FILE}")
    line = progress_text(STEPS, meter(STEPS.done), 10.0, 200)
    assert line.endswith("120/200 steps  0:06 left  loss 1.9345  held-out 2.0123  812 tokens/s  lr 1.80e-04")


def test_at_80_columns_a_training_line_keeps_losses_and_speed() -> None:
    line = progress_text(STEPS, meter(STEPS.done), 10.0, 80)
    assert "120/200 steps  0:06 left  loss 1.9345  held-out 2.0123  812 tokens/s" in line


def test_the_line_of_a_log_is_a_sentence_with_commas() -> None:
    assert progress_text(STEPS, meter(120), 10.0) == (
        "train 120/200 steps, loss 1.9345, held-out 2.0123, 812 tokens/s, lr 1.80e-04, 0:06 left"
    )


def test_foreign_names_are_escaped() -> None:
    line = progress_text(Progress("fetch", 0, None, "bytes", {"name": "a\x1b[2Jb"}), Meter(), 0.0, 80)
    assert "\x1b" not in line
    assert r"\x1b[2J" in line


def test_what_one_phase_takes_does_not_slow_another() -> None:
    train = Meter()
    for step in range(10):
        train.advance(100.0 * step, step)  # here the phase begins again; a step takes a second
        train.advance(100.0 * step + 1.0, step + 1)
        train.pause(100.0 * step + 1.0)  # and then 99 are spent on something else
    assert train.rate() == pytest.approx(1.0)


def test_work_of_an_earlier_run_does_not_count_as_speed() -> None:
    resumed = Meter()
    resumed.advance(0.0, 1000)
    assert resumed.rate() is None
    resumed.advance(2.0, 1010)
    assert resumed.rate() == pytest.approx(5.0)


def test_a_phase_that_starts_anew_is_measured_anew() -> None:
    held_out = Meter()
    held_out.advance(0.0, 0)
    held_out.advance(1.0, 300)
    held_out.advance(2.0, 0)
    assert held_out.rate() is None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    shown = StringIO()
    console = Console(file=shown, soft_wrap=True)
    monkeypatch.setattr(terminal, "stderr", console)
    monkeypatch.setattr(progress, "stderr", console)
    return shown


def test_without_a_terminal_a_short_command_says_nothing(log: StringIO) -> None:
    with progress.shown("decompose") as track:
        track(BYTES)
    assert log.getvalue() == ""


def test_without_a_terminal_a_line_is_written_at_intervals_also_for_a_silent_phase(
    log: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with progress.shown("decompose") as track:
        _wait_for(log, "start")
        track(BYTES)
        _wait_for(log, "200.0/600.0 MB")
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("svdconvert: start 0:0")
    assert lines[-1] == "svdconvert: decompose 200.0/600.0 MB"
    assert "log" not in [thread.name for thread in threading.enumerate()]


def _wait_for(log: StringIO, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in log.getvalue():
        assert time.monotonic() < deadline, log.getvalue()
        time.sleep(0.005)


def test_every_n_steps_leave_a_line_and_so_does_the_last(log: StringIO) -> None:
    with progress.shown("train", log_every=4) as track:
        for step in range(1, 11):
            track(Progress("train", step, 10, "steps", {"loss": 1.0 / step}))
            track(Progress("held-out", 0, 8, "rows"))
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == [
        "svdconvert: train 4/10 steps",
        "svdconvert: train 8/10 steps",
        "svdconvert: train 10/10 steps",
    ]


def test_a_rank_that_does_not_lead_shows_nothing(log: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.shown("train", log_every=1) as track:
        track(STEPS)
    assert log.getvalue() == ""


def test_sentences_on_a_terminal_break_at_spaces_and_addresses_stay_whole() -> None:
    address = "https://huggingface.co/org/name/commit/" + "0123456789abcdef" * 5
    console = Console(file=StringIO(), force_terminal=True, width=40)
    text = "the quick brown fox jumps over the lazy dog and goes home again"
    lines = terminal.wrapped(f"{text} {address}", console).split("\n")
    assert address in lines
    assert [line for line in lines if len(line) > 40 and line != address] == []
    assert " ".join(lines) == f"{text} {address}"
    assert terminal.wrapped(text, Console(file=StringIO(), width=40)) == text
