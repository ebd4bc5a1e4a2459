"""Progress counts what this run did, and the bars show it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import outfluence.progress
from outfluence.progress import Bars, Progress, Tracker, as_callback

MIB = 1 << 20


@pytest.fixture
def clock(monkeypatch):
    """Time as the tracker sees it; tests set it."""
    now = [1000.0]
    monkeypatch.setattr(outfluence.progress, "perf_counter", lambda: now[0])
    return now


def receipt(written=MIB, peak=10 * MIB, **more):
    return {"bytes_written": written, "peak_bytes": peak, **more}


def test_a_run_that_goes_on_counts_only_what_it_does(clock):
    events = []
    tracker = Tracker("scores", 10, 95, tasks_before=6, samples_before=60, callback=events.append)
    (begun,) = events
    assert (begun.stage, begun.tasks_done, begun.samples_done, begun.seconds) == ("scores", 6, 60, 0)
    assert (begun.samples_per_second, begun.bytes_per_second, begun.remaining_seconds) == (0, 0, None)
    clock[0] += 2
    tracker.update(10, receipt(3 * MIB, 20 * MIB, bytes_read=MIB))
    assert events[-1] == tracker.progress == Progress("scores", 10, 7, 6, 0, 95, 70, 60, 0, 3 * MIB, MIB, 20 * MIB, 2)
    assert events[-1].samples_per_second == 5
    assert events[-1].bytes_per_second == 2 * MIB
    assert events[-1].remaining_seconds == 25 / 5
    clock[0] += 2
    tracker.update(10, receipt(5 * MIB, 15 * MIB))
    assert (events[-1].bytes_written, events[-1].bytes_read, events[-1].peak_bytes) == (8 * MIB, MIB, 20 * MIB)
    tracker.update(10, receipt())
    assert not events[-1].is_finished
    tracker.update(5, receipt())
    assert events[-1].is_finished
    assert (events[-1].samples_done, events[-1].remaining_seconds, len(events)) == (95, 0, 5)


def test_failed_tasks_are_not_done_but_nothing_waits_for_them(clock):
    tracker = Tracker("factors", 3, 30, 0, 0, None)
    clock[0] += 1
    tracker.update(10, None)
    assert (tracker.progress.failed, tracker.progress.tasks_done, tracker.progress.samples_done) == (1, 0, 0)
    assert tracker.progress.remaining_seconds is None
    tracker.update(10, receipt())
    assert tracker.progress.remaining_seconds == 1  # of the ten samples that are left
    tracker.update(10, receipt())
    assert tracker.progress.is_finished
    assert (tracker.progress.remaining_seconds, tracker.progress.samples_failed) == (0, 10)


def test_a_stage_that_was_done_before_is_finished_at_once():
    events = []
    Tracker("factors", 3, 30, 3, 30, events.append)
    assert [(e.is_finished, e.remaining_seconds, e.samples_per_second) for e in events] == [(True, 0, 0)]


def test_what_a_callback_raises_ends_the_run():
    def stop(progress):
        if progress.tasks_done:
            raise KeyboardInterrupt

    tracker = Tracker("scores", 2, 2, 0, 0, stop)
    with pytest.raises(KeyboardInterrupt):
        tracker.update(1, receipt())


def lines(capsys):
    """What stays of each line on the terminal: the last thing that was written to it."""
    written = capsys.readouterr().err.split("\n")
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in written if line]


def test_bars(capsys):
    bars = Bars()
    Tracker("factors", 2, 20, 2, 20, bars)
    tracker = Tracker("scores", 4, 40, 1, 10, bars)
    assert bars._bar.initial == 10  # its rate is that of this run
    for one in (receipt(), None, receipt(peak=30 * MIB)):
        tracker.update(10, one)
    assert bars._bar is None  # closed, though nobody said so
    factors, scores = lines(capsys)
    assert factors.startswith("factors: 100%")
    assert "20/20" in factors
    assert scores.startswith("scores:  75%")
    for text in ("30/40", "samples/s", "iB/s", "peak 30.00 MiB", "1 failed"):
        assert text in scores


def test_a_failure_is_drawn_at_once(capsys):
    bars = Bars()
    tracker = Tracker("scores", 3, 30, 0, 0, bars)
    tracker.update(10, None)
    assert "1 failed" in capsys.readouterr().err
    bars.close()


def test_bars_of_a_run_that_was_interrupted(capsys):
    bars = Bars()
    Tracker("scores", 4, 40, 0, 0, bars).update(10, receipt())
    bars.close()
    bars.close()
    Tracker("scores", 4, 40, 1, 10, bars).update(10, receipt())
    Tracker("scores", 4, 40, 2, 20, bars).update(10, receipt())  # nobody closed, and the same stage begins again
    bars.close()
    shown = lines(capsys)
    assert [text for line in shown for text in ("10/40", "20/40", "30/40") if text in line] == [
        "10/40",
        "20/40",
        "30/40",
    ]


def test_as_callback():
    assert isinstance(as_callback(True), Bars)
    assert as_callback(False) is None
    assert as_callback(print) is print
    with pytest.raises(TypeError, match="progress must be True, False or a function of a Progress, not 'yes'"):
        as_callback("yes")


def test_progress_loads_no_torch():
    code = "import sys, outfluence.progress; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0
