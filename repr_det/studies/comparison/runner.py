"""Trains runs as subprocesses: several at once, resumed where they stopped, with progress, ended with their parent."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repr_det.commands.processes import run_tool
from repr_det.runs.files import run_traces
from repr_det.runs.lock import RunLock
from repr_det.runs.stopping import end_with_parent
from repr_det.studies.comparison.progress import Progress
from repr_det.studies.comparison.runs import Run, is_finished

OUTPUT_FILE = "stdout.txt"
_SHOWN_LINES = 20
_GRACE_SECONDS = 10.0


class RunFailed(RuntimeError):
    """A run ended without its final evaluation; the message holds the end of its output and the command."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated like Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


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
        sys.exit(143 if isinstance(error, Terminated) else 130)


def run_all(runs: Sequence[Run], jobs: int = 1, num_gpus: int = 1, progress: Progress | None = None) -> None:
    """Trains the runs that are not finished yet, ``jobs`` at once.

    A run that had begun gets --resume. The output of each is appended to its folder's stdout.txt. Every child has
    cores // jobs CPU threads (unless OMP_NUM_THREADS is set) and, if there are enough, GPUs of its own.

    Raises:
        RunFailed: a run failed; the others were ended and continue when called again.
        UserError: another process is training in one of the folders.
    """
    waiting = [run for run in runs if not is_finished(run)]
    progress = progress or Progress(runs)
    progress.skipped([run for run in runs if run not in waiting])
    active: dict[int, _Job] = {}  # by slot
    try:
        while waiting or active:
            for slot in range(jobs):
                if slot in active and active[slot].process.poll() is not None:
                    job = active.pop(slot)
                    if job.process.returncode or not is_finished(job.run):
                        raise RunFailed(_failure(job))
                    progress.finished(job.run)
                if slot not in active and waiting:
                    run = waiting.pop(0)
                    active[slot] = _start(run, _environment(slot, jobs, num_gpus))
                    progress.started(run)
            progress.show()
            time.sleep(0.2)
    finally:
        _stop(active.values())
        progress.close()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Job:
    run: Run
    command: list[str]
    process: subprocess.Popen


def _start(run: Run, environment: dict[str, str]) -> _Job:
    command = run.command(resume=bool(run_traces(run.folder)))
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run.folder)  # the run locks its folder itself; here for a line of the comparison's own
    lock.acquire()
    lock.release()
    with (run.folder / OUTPUT_FILE).open("a", encoding="utf-8") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return _Job(run, command, process)


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    import torch

    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // jobs)))
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    if jobs > 1 and all(gpus) and len(gpus) >= jobs * num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * num_gpus : (slot + 1) * num_gpus])
    return environment


def _stop(jobs: Iterable[_Job]) -> None:
    """SIGTERM to the process groups of all jobs, SIGKILL to what is left after a grace period or a second Ctrl-C."""
    jobs = list(jobs)
    for job in jobs:
        _signal_group(job, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        for job in jobs:
            job.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    for job in jobs:
        _signal_group(job, signal.SIGKILL)
        job.process.wait()


def _signal_group(job: _Job, number: int) -> None:
    try:
        os.killpg(job.process.pid, number)
    except (ProcessLookupError, PermissionError):  # it has ended
        pass


def _failure(job: _Job) -> str:
    code = job.process.returncode
    if code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    elif code:
        how = f"ended with status {code}"
    else:
        how = "ended without an evaluation after its last iteration"
    path = job.run.folder / OUTPUT_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
    shown = "\n".join(f"  | {line}" for line in lines)
    return f"the run {job.run.name} {how}. The end of {path}:\n{shown}\nTo repeat it:\n  {shlex.join(job.command)}"
