"""The runner of a comparison with a fake training command: at once, skipped, resumed, failed, killed."""

import functools
import io
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
from repr_det.studies.comparison.runner import RunFailed, _environment, run_all
from repr_det.studies.comparison.runs import Run, final_row, is_finished

ROOT = Path(__file__).resolve().parents[1]


# ---- the runner, with a fake training command ----

FAKE = """
import fcntl, json, os, sys, time
folder, steps, pause, status = sys.argv[1], int(sys.argv[-3]), float(sys.argv[-2]), int(sys.argv[-1])
lock = open(folder + "/.running", "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as repr_det.train does
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

    def make(seed, steps=3, pause=0.02, status=0, arm="repr"):
        folder = tmp_path / f"{arm}{seed}"
        words = tuple(str(v) for v in (steps, pause, status))
        return Run(arm, seed, folder, steps, (sys.executable, str(script), str(folder)), words)

    return make


def _calls(run):
    return (run.folder / "calls.txt").read_text().splitlines()


def _progress(runs):
    stream = io.StringIO()
    return Progress(runs, stream, interval=0.2), stream


def test_runs_are_trained_once_and_then_skipped(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [fake(1), fake(2), fake(3)]
    progress, stream = _progress(runs)
    run_all(runs, jobs=2, progress=progress)
    assert all(map(is_finished, runs))
    assert final_row(runs[0].folder, 3)["bbox/AP"] == 33.0
    cores = len(os.sched_getaffinity(0))
    assert [_calls(run) for run in runs] == [[f"|{max(1, cores // 2)}"]] * 3
    assert "step 2" in (runs[0].folder / "stdout.txt").read_text()
    assert "3 of 3" in stream.getvalue() or "done in" in stream.getvalue()
    progress, stream = _progress(runs)
    run_all(runs, progress=progress)
    assert [len(_calls(run)) for run in runs] == [1, 1, 1]
    assert "finished already: RePr seed 1, RePr seed 2, RePr seed 3" in stream.getvalue()


def test_progress_says_how_far_every_run_is_and_what_is_left(fake):
    runs = [fake(1, steps=4, pause=0.4), fake(2, steps=4, pause=0.4)]
    write_metrics(runs[1].folder, *({"iteration": i, "total_loss": 1.0} for i in range(2)))  # resumed: two are done
    progress, stream = _progress(runs)
    run_all(runs, progress=progress)
    lines = stream.getvalue().splitlines()
    assert any(
        re.search(r"RePr seed 1: 2/4 loss 1.000 ETA 0:0\d \| 0 of 2 runs done, 0:0\d passed, total ETA", x)
        for x in lines
    )
    assert any(re.search(r"RePr seed 2: 3/4 loss 1.000 ETA .* \| 1 of 2 runs done", x) for x in lines)
    assert re.search(r"RePr seed 1: done in 0:0[1-4]$", "\n".join(lines), re.M)


def test_progress_on_a_terminal_redraws_a_bar_for_every_run(fake, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    stream.isatty = lambda: True
    runs = [fake(1, steps=4, pause=0.4)]
    run_all(runs, progress=Progress(runs, stream))
    text = stream.getvalue()
    assert "RePr seed 1" in text and "4/4" in text and "\x1b[" in text and "loss 1.000" in text


@pytest.mark.parametrize(
    "visible, jobs, num_gpus, expected",
    [
        ("3,5", 2, 1, ["3", "5"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0", 2, 1, ["0", "0"]),  # too few to share out: as given
        ("4,6", 1, 1, ["4,6"]),
    ],
)
def test_every_run_gets_gpus_of_its_own(monkeypatch, visible, jobs, num_gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [_environment(slot, jobs, num_gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(jobs)]
    assert found == expected


def test_an_unfinished_run_is_resumed(fake):
    run = fake(1, steps=5)
    write_metrics(run.folder, *({"iteration": i, "total_loss": 1.0} for i in range(3)))
    run_all([run], progress=_progress([run])[0])
    assert _calls(run)[0].startswith("--resume|")
    assert list(read_metrics(run.folder)) == [0, 1, 2, 3, 4, 5]


def test_two_runs_really_go_on_at_once(fake):
    runs = [fake(n, steps=15, pause=0.1) for n in (1, 2)]
    run_all(runs, jobs=2, progress=_progress(runs)[0])
    first, second = ([row["wall"] for row in read_metrics(run.folder).values() if "wall" in row] for run in runs)
    assert min(second) < max(first) and min(first) < max(second)


def test_a_failure_shows_its_output_and_command_and_ends_the_rest(fake):
    good, bad = fake(1, steps=500, pause=0.1), fake(2, steps=2, status=3)
    with pytest.raises(RunFailed) as error:
        run_all([good, bad], jobs=2, progress=_progress([good, bad])[0])
    text = str(error.value)
    assert "RePr seed 2 ended with status 3" in text
    assert "| Traceback: it broke" in text and "| step 1" in text
    assert text.rstrip().endswith(f"{bad.folder} 2 0.02 3")
    assert not _alive(good)
    assert not is_finished(good)


def test_a_run_that_ends_without_an_evaluation_has_failed(fake):
    run = fake(1)
    silent = Run("repr", 1, run.folder, 99, run.flags, run.opts)  # needs 99 iterations, the script makes 3
    with pytest.raises(RunFailed, match="ended without an evaluation"):
        run_all([silent], progress=_progress([silent])[0])


def _alive(run):
    """Whether a process trains in the folder: the size of its output still changes."""
    before = (run.folder / "stdout.txt").stat().st_size
    time.sleep(0.4)
    return (run.folder / "stdout.txt").stat().st_size != before


# A parent process without Detectron2, which takes seconds to import and has no part in this.
PARENT = """
import sys, types
from pathlib import Path
sys.modules["repr_det.commands.processes"] = types.SimpleNamespace(run_tool=lambda main: main())
from repr_det.studies.comparison.runner import run_all, run_comparison_tool
from repr_det.studies.comparison.runs import Run
flags = (sys.executable, sys.argv[1], sys.argv[2])
run_comparison_tool(lambda: run_all([Run("repr", 1, Path(sys.argv[2]), 40, flags, ("40", "0.1", "0"))]))
"""


def _start_parent(run):
    command = [sys.executable, "-c", PARENT, run.flags[1], str(run.folder)]
    # A shell starts background jobs with SIGINT ignored, and so would these tests' children be where they are one.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 40
    metrics = run.folder / "metrics.json"
    while not (metrics.exists() and b"\n" in metrics.read_bytes()):  # the file is there before its first line is
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return parent


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_comparison_leaves_no_child_and_continues(fake, number, status):
    run = fake(1, steps=40, pause=0.1)
    parent = _start_parent(run)
    if number == signal.SIGTERM:  # while it trains, nobody else may
        with pytest.raises(UserError, match="is being trained by another process"):
            run_all([run], progress=_progress([run])[0])
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=15)
    assert parent.returncode == status
    if number != signal.SIGKILL:
        assert "the same command continues" in errors
    time.sleep(0.3)
    assert not _alive(run)
    steps = len(read_metrics(run.folder))
    assert 0 < steps < 40
    short = Run("repr", 1, run.folder, steps + 2, run.flags, (str(steps + 2), "0.01", "0"))
    run_all([short], progress=_progress([short])[0])
    assert _calls(run)[-1].startswith("--resume|") and is_finished(short)
