"""The runner of a comparison with a fake training command: at once, skipped, resumed, failed, killed."""

import dataclasses
import multiprocessing
import os
import re
import signal
import sys
import time

import forked
import pytest
from finished_runs import write_lines

from repr_det.studies.comparison import runner
from repr_det.studies.comparison.records import Run, is_finished, read_metrics
from repr_det.studies.comparison.runner import RunFailed, run_all, run_comparison_tool

FAKE = """
import json, os, sys, time
folder, steps, pause, status = sys.argv[-4], int(sys.argv[-3]), float(sys.argv[-2]), int(sys.argv[-1])
log = lambda **row: open(folder + "/metrics.json", "a").write(json.dumps(row) + chr(10))
open(folder + "/calls.txt", "a").write(" ".join(sys.argv[1:-4]) + "|" + os.environ["OMP_NUM_THREADS"] + chr(10))
done = sum(1 for _ in open(folder + "/metrics.json")) if "--resume" in sys.argv else 0
for step in range(done, steps):
    time.sleep(pause)
    print("step", step)
    log(iteration=step, total_loss=1.0, wall=time.time())
if status:
    print("Traceback: it broke", file=sys.stderr)
    sys.exit(status)
log(**{"iteration": steps, "bbox/AP": 33.0})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``fake(seed, steps, pause, status)`` -> a Run that is trained by a script that writes metrics.json."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(runner, "TRAIN", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_LOOKS", 0.05)

    def make(seed, steps=3, pause=0.02, status=0):
        folder = tmp_path / f"repr{seed}"
        return Run("repr", seed, folder, steps, tuple(map(str, (folder, steps, pause, status))))

    return make


def _calls(run):
    return (run.folder / "calls.txt").read_text().splitlines()


def test_runs_at_once_their_progress_and_that_they_are_trained_once(fake, monkeypatch, capsys):
    """The second is resumed: two of its steps were done before."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [fake(1, steps=12, pause=0.1), fake(2, steps=12, pause=0.1), fake(3)]
    write_lines(runs[1].folder / "metrics.json", *({"iteration": i, "total_loss": 1.0} for i in range(2)))
    run_all(runs, jobs=2)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    calls = [[f"|{threads}"], [f"--resume|{threads}"], [f"|{threads}"]]
    assert [_calls(run) for run in runs] == calls and all(map(is_finished, runs))
    assert list(read_metrics(runs[1].folder)) == list(range(13))
    assert "step 2" in (runs[0].folder / "stdout.txt").read_text()
    first, second = ([row.get("wall", 0) for row in read_metrics(run.folder).values()] for run in runs[:2])
    assert second[2] < first[11] and first[0] < second[11]
    shown = capsys.readouterr().err
    assert "[compare] RePr seed 3: done" in shown
    assert 4 <= len(re.findall(r"\[compare\] \d+% after 0:00:\d\d, about 0:00:\d\d left\n", shown)) <= 20
    run_all(runs)
    assert "finished already: RePr seed 1, RePr seed 2, RePr seed 3" in capsys.readouterr().err
    assert [_calls(run) for run in runs] == calls


@pytest.mark.parametrize(
    ("visible", "num_gpus", "expected"),
    [("3,5", 1, ["3", "5"]), ("0,1,2,3", 2, ["0,1", "2,3"]), ("0", 1, ["0", "0"])],  # the last: too few to share out
)
def test_every_run_gets_gpus_of_its_own(monkeypatch, visible, num_gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [runner._environment(slot, 2, num_gpus)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == expected


def test_a_failure_shows_its_output_and_command_and_ends_the_rest(fake):
    good, bad = fake(1, steps=500, pause=0.1), fake(2, steps=2, status=3)
    with pytest.raises(RunFailed) as error:
        run_all([good, bad], jobs=2)
    text = str(error.value)
    assert "error: RePr seed 2 ended with status 3" in text and "| Traceback: it broke" in text
    assert text.endswith(f"{bad.folder} 2 0.02 3")
    assert not _alive(good) and not is_finished(good)
    with pytest.raises(RunFailed, match="ended without an evaluation"):
        run_all([dataclasses.replace(fake(3), max_iter=99)])  # the script makes 3 iterations


def _alive(run):
    """True if a process trains in the folder: the size of its output still changes."""
    before = (run.folder / "stdout.txt").stat().st_size
    time.sleep(0.4)
    return (run.folder / "stdout.txt").stat().st_size != before


def _comparison(run, errors):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    sys.stderr = errors.open("w", buffering=1)
    run_comparison_tool(lambda: run_all([run]))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_comparison_leaves_no_child_and_continues(fake, tmp_path, number, status):
    run = fake(1, steps=40, pause=0.1)
    parent = multiprocessing.get_context("fork").Process(target=_comparison, args=(run, tmp_path / "errors"))
    parent.start()
    forked.wait_until(lambda: read_metrics(run.folder))
    os.kill(parent.pid, number)
    parent.join(15)
    assert parent.exitcode == status
    assert ("the same command continues" in (tmp_path / "errors").read_text()) == (number != signal.SIGKILL)
    time.sleep(0.3)
    assert not _alive(run)
    steps = len(read_metrics(run.folder))
    assert 0 < steps < 40
    short = fake(1, steps=steps + 2)
    run_all([short])
    assert _calls(run)[-1].startswith("--resume|") and is_finished(short)
