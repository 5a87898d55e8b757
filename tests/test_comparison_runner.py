"""The runner of a comparison with a fake training command: at once, skipped, resumed, failed, killed."""

import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_runs import write_metrics

from repr_det.method.errors import UserError
from repr_det.studies.comparison.progress import Progress
from repr_det.studies.comparison.records import read_metrics
from repr_det.studies.comparison.runner import RunFailed, _environment, run_all, run_comparison_tool
from repr_det.studies.comparison.runs import Run, final_row, is_finished

ROOT = Path(__file__).resolve().parents[1]
FAKE = """
import json, os, sys, time
folder, steps, pause, status = sys.argv[1], int(sys.argv[-3]), float(sys.argv[-2]), int(sys.argv[-1])
log = lambda **row: open(folder + "/metrics.json", "a").write(json.dumps(row) + chr(10))
open(folder + "/calls.txt", "a").write(" ".join(sys.argv[2:-3]) + "|" + os.environ["OMP_NUM_THREADS"] + chr(10))
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
def fake(tmp_path):
    """``fake(seed, steps, pause, status)`` -> a Run whose command is a script that writes metrics.json."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def make(seed, steps=3, pause=0.02, status=0):
        folder = tmp_path / f"repr{seed}"
        words = tuple(str(v) for v in (steps, pause, status))
        return Run("repr", seed, folder, steps, (sys.executable, str(script), str(folder)), words)

    return make


def _calls(run):
    return (run.folder / "calls.txt").read_text().splitlines()


def _train(*runs, jobs=1, terminal=False):
    """Returns what the progress shows."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    run_all(runs, jobs, progress=Progress(runs, stream, interval=0.2))
    return stream.getvalue()


def test_runs_are_trained_once_and_then_skipped(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [fake(1), fake(2), fake(3)]
    shown = _train(*runs, jobs=2)
    assert all(map(is_finished, runs)) and "RePr seed 3: done" in shown
    assert final_row(read_metrics(runs[0].folder), 3)["bbox/AP"] == 33.0
    cores = len(os.sched_getaffinity(0))
    assert [_calls(run) for run in runs] == [[f"|{max(1, cores // 2)}"]] * 3
    assert "step 2" in (runs[0].folder / "stdout.txt").read_text()
    assert "finished already: RePr seed 1, RePr seed 2, RePr seed 3" in _train(*runs)
    assert [len(_calls(run)) for run in runs] == [1, 1, 1]


def test_progress_says_how_far_every_run_is_and_what_is_left(fake):
    runs = [fake(1, steps=4, pause=0.4), fake(2, steps=4, pause=0.4)]
    write_metrics(runs[1].folder, *({"iteration": i, "total_loss": 1.0} for i in range(2)))  # resumed: two are done
    shown = _train(*runs)
    assert re.search(r"0 of 2 runs done .* 4/8 .*ETA 0:00:0\d *\nRePr seed 1 .* 2/4 loss 1.000 .*ETA 0:00:0\d", shown)
    assert re.search(r"1 of 2 runs done .* 7/8 .*\nRePr seed 2 .* 3/4 loss 1.000 .* ETA", shown)
    assert "\x1b[" not in shown


def test_progress_on_a_terminal_redraws_a_bar_for_every_run(fake, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    shown = _train(fake(1, steps=4, pause=0.4), terminal=True)
    assert "RePr seed 1" in shown and "4/4" in shown and "\x1b[" in shown and "loss 1.000" in shown


@pytest.mark.parametrize(
    ("visible", "jobs", "num_gpus", "expected"),
    [
        ("3,5", 2, 1, ["3", "5"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0", 2, 1, ["0", "0"]),  # too few to share out: as given
        ("4,6", 1, 1, ["4,6"]),
        ("", 1, 1, [""]),
    ],
)
def test_every_run_gets_gpus_of_its_own(monkeypatch, visible, jobs, num_gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [_environment(slot, jobs, num_gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(jobs)]
    assert found == expected


def test_an_unfinished_run_is_resumed(fake):
    run = fake(1, steps=5)
    write_metrics(run.folder, *({"iteration": i, "total_loss": 1.0} for i in range(3)))
    _train(run)
    assert _calls(run)[0].startswith("--resume|")
    assert list(read_metrics(run.folder)) == [0, 1, 2, 3, 4, 5]


def test_two_runs_are_really_trained_at_once(fake):
    runs = [fake(n, steps=15, pause=0.1) for n in (1, 2)]
    _train(*runs, jobs=2)
    first, second = ([row["wall"] for row in read_metrics(run.folder).values() if "wall" in row] for run in runs)
    assert min(second) < max(first) and min(first) < max(second)


def test_a_failure_shows_its_output_and_command_and_ends_the_rest(fake):
    good, bad = fake(1, steps=500, pause=0.1), fake(2, steps=2, status=3)
    with pytest.raises(RunFailed) as error:
        _train(good, bad, jobs=2)
    text = str(error.value)
    assert "RePr seed 2 ended with status 3" in text
    assert "| Traceback: it broke" in text and "| step 1" in text
    assert text.rstrip().endswith(f"{bad.folder} 2 0.02 3")
    assert not _alive(good) and not is_finished(good)


def test_a_run_that_ends_without_an_evaluation_has_failed(fake):
    run = fake(1)
    with pytest.raises(RunFailed, match="ended without an evaluation"):
        _train(Run("repr", 1, run.folder, 99, run.flags, run.opts))  # needs 99 iterations, the script makes 3


def test_a_folder_in_which_another_process_trains_is_refused(fake):
    run = fake(1)
    hold = "import sys; from repr_det.runs.lock import RunLock; lock = RunLock(sys.argv[1]); lock.acquire()"
    command = [sys.executable, "-c", f"{hold}; print(1, flush=True); input()", str(run.folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="is being trained by another process"):
            _train(run)
    assert not (run.folder / "calls.txt").exists()


def _alive(run):
    """True if a process trains in the folder: the size of its output still changes."""
    before = (run.folder / "stdout.txt").stat().st_size
    time.sleep(0.4)
    return (run.folder / "stdout.txt").stat().st_size != before


def _comparison(run, errors):
    # A shell starts background jobs with SIGINT ignored, and so would these tests' children be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = errors.open("w", buffering=1)
    run_comparison_tool(lambda: run_all([run]))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_comparison_leaves_no_child_and_continues(fake, tmp_path, number, status):
    run = fake(1, steps=40, pause=0.1)
    parent = multiprocessing.get_context("fork").Process(target=_comparison, args=(run, tmp_path / "errors"))
    parent.start()
    deadline = time.monotonic() + 40
    while not read_metrics(run.folder):
        assert parent.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(parent.pid, number)
    parent.join(15)
    assert parent.exitcode == status
    assert ("the same command continues" in (tmp_path / "errors").read_text()) == (number != signal.SIGKILL)
    time.sleep(0.3)
    assert not _alive(run)
    steps = len(read_metrics(run.folder))
    assert 0 < steps < 40
    short = Run("repr", 1, run.folder, steps + 2, run.flags, (str(steps + 2), "0.01", "0"))
    _train(short)
    assert _calls(run)[-1].startswith("--resume|") and is_finished(short)
