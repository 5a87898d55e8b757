"""Trains runs as subprocesses: several at once, resumed, ended with their parent."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from repr_det.commands.processes import run_tool
from repr_det.runs.files import METRICS_FILE, last_logged, run_traces
from repr_det.runs.stopping import end_with_parent
from repr_det.studies.comparison.records import Run, is_finished

TRAIN = (sys.executable, "-m", "repr_det.train")
OUTPUT_FILE = "stdout.txt"
_SHOWN_LINES = 20
_GRACE_SECONDS = 10.0
_SECONDS_BETWEEN_LOOKS = 3.0
_STEP = 0.05  # share of all iterations between two lines of progress


class RunFailed(SystemExit):
    """A run ended without its final evaluation; Python exits with its message and status 1."""


def run_comparison_tool(main: Callable[[], Any]) -> None:
    """Runs a tool: status 2 for a UserError, 1 for a failed run, 130 for Ctrl-C, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run_tool(main)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped; the same command continues\n")
        sys.exit(143 if error.args else 130)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


def say(text: str) -> None:
    sys.stderr.write(f"[compare] {text}\n")


def run_all(runs: Sequence[Run], jobs: int = 1, num_gpus: int = 1) -> None:
    """Trains or resumes unfinished runs, ``jobs`` at once, with output in stdout.txt. If one fails (RunFailed), the
    others are ended."""
    waiting = [run for run in runs if not is_finished(run)]
    done = [run.name for run in runs if run not in waiting]
    if done:
        say(f"finished already: {', '.join(done)}")
    progress = _Progress(waiting)
    active: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    try:
        while waiting or active:
            for slot in range(jobs):
                run, process = active.get(slot, (None, None))
                if run and process.poll() is not None:
                    del active[slot]
                    if process.returncode or not is_finished(run):
                        raise RunFailed(_failure(run, process))
                    say(f"{run.name}: done")
                if slot not in active and waiting:
                    run = waiting.pop(0)
                    active[slot] = run, _start(run, _environment(slot, jobs, num_gpus))
                    say(f"{run.name}: started, output in {run.folder / OUTPUT_FILE}")
            progress.show()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        _stop([process for _, process in active.values()])


class _Progress:
    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.total = sum(run.max_iter for run in runs)
        self.at_start = self.said = self._trained()
        self.start = time.monotonic()

    def show(self) -> None:
        trained = self._trained()
        if trained - self.said < _STEP * self.total:
            return
        self.said = trained
        passed = time.monotonic() - self.start
        left = passed / (trained - self.at_start) * (self.total - trained)
        times = [timedelta(seconds=round(seconds)) for seconds in (passed, left)]
        say(f"{trained / self.total:.0%} after {times[0]}, about {times[1]} left")

    def _trained(self) -> int:
        return sum(min(last_logged(run.folder / METRICS_FILE) + 1, run.max_iter) for run in self.runs)


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen:
    command = [*TRAIN, *(["--resume"] if run_traces(run.folder) else []), *run.arguments]
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / OUTPUT_FILE).open("a", buffering=1, encoding="utf-8") as output:
        output.write(f"$ {shlex.join(command)}\n")
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    """A share of the CPU threads, unless OMP_NUM_THREADS is set, and own GPUs if there are enough."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    if jobs > 1 and all(gpus) and len(gpus) >= jobs * num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * num_gpus : (slot + 1) * num_gpus])
    return environment


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to their process groups, SIGKILL after a grace period or a second Ctrl-C."""
    deadline = time.monotonic() + _GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # has ended
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))


def _failure(run: Run, process: subprocess.Popen) -> str:
    code = process.returncode
    how = f"ended with status {code}" if code else "ended without an evaluation after its last iteration"
    if code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    path = run.folder / OUTPUT_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
    shown = "\n".join(f"  | {line}" for line in lines)
    return f"error: {run.name} {how}. The end of {path}:\n{shown}\nTo repeat it:\n  {shlex.join(process.args)}"
