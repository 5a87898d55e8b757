"""Trains runs as subprocesses: several at once, resumed where they stopped, with progress, ended with their parent."""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from repr_det.commands.processes import run_tool
from repr_det.runs.files import METRICS_FILE, run_traces
from repr_det.runs.stopping import end_with_parent
from repr_det.studies.comparison.records import read_json_lines
from repr_det.studies.comparison.runs import Run, is_finished

OUTPUT_FILE = "stdout.txt"
_SHOWN_LINES = 20
_GRACE_SECONDS = 10.0
_SECONDS_BETWEEN_READINGS = 1.0
_STEP = 0.05  # share of all iterations between two lines of progress


class RunFailed(RuntimeError):
    """A run ended without its final evaluation; the message holds the end of its output and the command."""


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt("SIGTERM")


def run_comparison_tool(main: Callable[[], Any]) -> None:
    """Runs a tool that trains: status 2 for what the user gave wrong, 1 for a run that failed, 130 for Ctrl-C, 143 for
    SIGTERM."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run_tool(main)
    except RunFailed as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{name}: stopped; the same command continues where it stopped\n")
        sys.exit(143 if error.args else 130)  # SIGTERM, Ctrl-C


def say(text: str) -> None:
    sys.stderr.write(f"[compare] {text}\n")


def run_all(runs: Sequence[Run], jobs: int = 1, num_gpus: int = 1) -> None:
    """Trains the runs that are not finished yet, ``jobs`` at once.

    A run that had begun gets --resume. The output of each is appended to its folder's stdout.txt. Every child has
    cores // jobs CPU threads (unless OMP_NUM_THREADS is set) and, if there are enough, GPUs of its own.

    Raises:
        RunFailed: a run failed; the others were ended and continue when called again.
    """
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
            progress.show([run for run, _ in active.values()])
            time.sleep(0.2)
    finally:
        _stop([process for _, process in active.values()])


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Progress:
    """A line for every twentieth of the iterations of all runs: how far each is, its loss, and the time left."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.total = sum(run.max_iter for run in runs)
        self.at_start = self.said = sum(_last_iteration(run)[0] for run in runs)
        self.start = self.last_reading = time.monotonic()

    def show(self, active: Sequence[Run]) -> None:
        """Writes a line if it is time to."""
        now = time.monotonic()
        if now - self.last_reading < _SECONDS_BETWEEN_READINGS:
            return
        self.last_reading = now
        states = {run: _last_iteration(run) for run in self.runs}
        trained = sum(iterations for iterations, _ in states.values())
        if trained - self.said < _STEP * self.total:
            return
        self.said = trained
        passed = now - self.start
        left = passed / (trained - self.at_start) * (self.total - trained)
        line = f"{100 * trained / self.total:.0f} % after {_duration(passed)}, about {_duration(left)} left"
        for run in active:
            line += f"; {run.name}: {states[run][0]} of {run.max_iter} iterations, loss {states[run][1]:.3f}"
        say(line)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _last_iteration(run: Run) -> tuple[int, float]:
    """The iterations that the run says it has trained, and its loss there."""
    lines = [line for line in read_json_lines(run.folder / METRICS_FILE) if "total_loss" in line]
    # The line written last, not the highest iteration: a resumed run repeats some.
    return (min(lines[-1]["iteration"] + 1, run.max_iter), lines[-1]["total_loss"]) if lines else (0, math.nan)


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen:
    command = run.command(resume=bool(run_traces(run.folder)))
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / OUTPUT_FILE).open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
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
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    if jobs > 1 and all(gpus) and len(gpus) >= jobs * num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * num_gpus : (slot + 1) * num_gpus])
    return environment


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to their process groups, SIGKILL to what is left after a grace period or a second Ctrl-C."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
        os.killpg(process.pid, number)


def _failure(run: Run, process: subprocess.Popen) -> str:
    code = process.returncode
    if code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    elif code:
        how = f"ended with status {code}"
    else:
        how = "ended without an evaluation after its last iteration"
    path = run.folder / OUTPUT_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
    shown = "\n".join(f"  | {line}" for line in lines)
    return f"the run {run.name} {how}. The end of {path}:\n{shown}\nTo repeat it:\n  {shlex.join(process.args)}"
