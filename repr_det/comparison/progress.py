"""Progress of several runs: one block that is redrawn on a terminal, a line every ten seconds elsewhere."""

import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from repr_det.comparison.records import read_json_lines
from repr_det.comparison.runs import Run
from repr_det.files import METRICS_FILE


@dataclass
class _State:
    phase: str = "waiting"  # waiting, running, done
    iteration: int = 0
    loss: float = math.nan
    step_seconds: float | None = None  # Detectron2's own figure: no evaluations, but there from the first report on
    first: tuple[int, float] | None = None  # iteration and time of the first report of this session
    latest: tuple[int, float] | None = None
    seen: tuple[float, int] = (0.0, 0)
    since: float = field(default_factory=time.time)

    @property
    def seconds_per_iteration(self) -> float | None:
        if self.first is None or self.latest is None or self.latest[0] <= self.first[0]:
            return self.step_seconds
        return (self.latest[1] - self.first[1]) / (self.latest[0] - self.first[0])


class Progress:
    """Reads the metrics.json of the runs under way and shows iteration, loss and the time left.

    Args:
        runs: all runs of the comparison.
        jobs: how many train at once.
        stream: where to write; a terminal gets the block.
        interval: seconds between lines where it is no terminal.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self.runs = list(runs)
        self.jobs = jobs
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.interval = 0.5 if self.terminal else interval
        self.states = {run: _State() for run in self.runs}
        self._drawn = 0
        self._began = time.time()
        self._next = self._began + min(self.interval, 2.0)

    def start(self, finished: Iterable[Run]) -> None:
        skipped = list(finished)
        for run in skipped:
            self.states[run].phase = "done"
        if skipped:
            self._say(f"finished already: {', '.join(run.name for run in skipped)}")

    def started(self, run: Run) -> None:
        self.states[run].phase = "running"
        self.states[run].since = time.time()
        if not self.terminal:
            self._say(f"{run.name}: started, output in {run.folder}")

    def finished(self, run: Run) -> None:
        self.states[run].phase = "done"
        if not self.terminal:
            self._say(f"{run.name}: done in {_clock(time.time() - self.states[run].since)}")

    def show(self) -> None:
        """Writes the state if it is time to."""
        if time.time() < self._next:
            return
        self._next = time.time() + self.interval
        running = [run for run in self.runs if self.states[run].phase == "running"]
        for run in running:
            self._read(run)
        if self.terminal:
            self._redraw([*(self._line(run) for run in running), self._total()])
        elif running:
            self._say(" | ".join([*(self._line(run) for run in running), self._total()]))

    def close(self) -> None:
        if self.terminal and self._drawn:
            self._redraw([self._total()])
            self._drawn = 0

    def _read(self, run: Run) -> None:
        state, path = self.states[run], run.folder / METRICS_FILE
        try:
            stat = path.stat()
        except OSError:
            return
        if (stat.st_mtime, stat.st_size) == state.seen:
            return
        state.seen = (stat.st_mtime, stat.st_size)
        lines = [line for line in read_json_lines(run.folder / METRICS_FILE) if "total_loss" in line]
        if not lines or stat.st_mtime < state.since:  # what an earlier session wrote says nothing about speed
            return
        # The line written last, not the highest iteration: a resumed run repeats some.
        state.iteration, state.loss = lines[-1]["iteration"] + 1, lines[-1]["total_loss"]
        state.step_seconds = lines[-1].get("time")
        state.latest = (state.iteration, stat.st_mtime)
        state.first = state.first or state.latest

    def _line(self, run: Run) -> str:
        state = self.states[run]
        if state.latest is None:
            return f"{run.name}: starting"
        if state.iteration >= run.max_iter:
            return f"{run.name}: {run.max_iter}/{run.max_iter}, final evaluation"
        left = self._seconds_left(run)
        return f"{run.name}: {state.iteration}/{run.max_iter} loss {state.loss:.3f} ETA {_clock(left)}"

    def _total(self) -> str:
        lefts = [self._seconds_left(run) for run in self.runs if self.states[run].phase != "done"]
        done = sum(state.phase == "done" for state in self.states.values())
        if not lefts:
            left = 0.0
        elif None in lefts:
            left = None
        else:
            # No shorter than the longest of them, and the work shared by the jobs.
            left = max(max(lefts), sum(lefts) / self.jobs)
        passed = _clock(time.time() - self._began)
        return f"{done} of {len(self.runs)} runs done, {passed} passed, total ETA {_clock(left)}"

    def _seconds_left(self, run: Run) -> float | None:
        state = self.states[run]
        speed = state.seconds_per_iteration
        if speed is None:
            known = [s for s in (other.seconds_per_iteration for other in self.states.values()) if s is not None]
            if not known:
                return None
            speed = sum(known) / len(known)
        left = (run.max_iter - state.iteration) * speed
        return max(0.0, left - (time.time() - state.latest[1] if state.latest else 0.0))

    def _redraw(self, lines: list[str]) -> None:
        width = shutil.get_terminal_size().columns - 1  # a line that wraps would throw the cursor off
        lines = [line[:width] for line in lines]
        if self._drawn:
            self.stream.write(f"\x1b[{self._drawn}A")
        self.stream.write("".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self._drawn = len(lines)

    def _say(self, text: str) -> None:
        self.stream.write(f"[{_clock(time.time() - self._began)}] {text}\n")
        self.stream.flush()


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
