"""Progress of several runs, by rich: bars on a terminal, a line every ten seconds elsewhere."""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import progress as bars
from rich.console import Console

from repr_det.runs.files import METRICS_FILE
from repr_det.studies.comparison.records import read_json_lines
from repr_det.studies.comparison.runs import Run


class Progress:
    """Reads the metrics.json of the runs under way and shows iteration, loss and the time left.

    The last bar counts the iterations of all runs, so the time that it leaves knows how many train at once.

    Args:
        runs: all runs of the comparison.
        stream: where to write; a terminal gets the bars.
        interval: seconds between lines where it is no terminal.
    """

    def __init__(self, runs: Sequence[Run], stream: TextIO | None = None, interval: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self._bars = bars.Progress(
            "{task.description}",
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            "{task.fields[note]}",
            bars.TimeElapsedColumn(),
            "ETA",
            bars.TimeRemainingColumn(),
            console=Console(file=self.stream),
            speed_estimate_period=300,
            disable=not self.stream.isatty(),
        )
        self.interval = 0.5 if self.stream.isatty() else interval
        self._seen = {run: _state_of(run) for run in runs}
        begun = sum(_iterations(run)[0] for run in runs)  # nothing that says how fast this session is
        self._all = self._bars.add_task("all", total=sum(run.max_iter for run in runs), completed=begun, note="")
        self._tasks: dict[Run, bars.TaskID] = {}
        self._number, self._done = len(runs), 0
        self._next = time.time() + min(self.interval, 2.0)
        self._bars.start()

    def start(self, finished: Iterable[Run]) -> None:
        skipped = list(finished)
        self._done = len(skipped)
        if skipped:
            self._say(f"finished already: {', '.join(run.name for run in skipped)}")

    def started(self, run: Run) -> None:
        done, _ = _iterations(run)
        self._tasks[run] = self._bars.add_task(run.name, total=run.max_iter, completed=done, note="starting")
        self._say(f"{run.name}: started, output in {run.folder}")

    def finished(self, run: Run) -> None:
        self._done += 1
        task = self._tasks.pop(run)
        self._set(task, run.max_iter)
        self._say(f"{run.name}: done in {_clock(self._task(task).elapsed)}")
        self._bars.remove_task(task)

    def show(self) -> None:
        """Reads the runs and, where there are no bars, writes a line, if it is time to."""
        if time.time() < self._next:
            return
        self._next = time.time() + self.interval
        for run, task in self._tasks.items():
            self._read(run, task)
        if self._tasks and self._bars.disable:
            self._say(" | ".join([*(self._line(task) for task in self._tasks.values()), self._total()]))

    def close(self) -> None:
        self._bars.stop()

    def _read(self, run: Run, task: bars.TaskID) -> None:
        if (state := _state_of(run)) == self._seen[run]:
            return
        self._seen[run] = state
        done, loss = _iterations(run)
        self._set(task, done, note=f"loss {loss:.3f}" if done < run.max_iter else "final evaluation")

    def _set(self, task: bars.TaskID, done: int, **fields: str) -> None:
        self._bars.update(self._all, advance=done - self._task(task).completed)
        self._bars.update(task, completed=done, **fields)

    def _line(self, task: bars.TaskID) -> str:
        now = self._task(task)
        done = f"{now.completed:.0f}/{now.total:.0f} " if now.completed else ""
        return f"{now.description}: {done}{now.fields['note']} ETA {_clock(now.time_remaining)}"

    def _total(self) -> str:
        now = self._task(self._all)
        return (
            f"{self._done} of {self._number} runs done, {_clock(now.elapsed)} passed, "
            f"total ETA {_clock(now.time_remaining)}"
        )

    def _task(self, task: bars.TaskID) -> bars.Task:
        return next(x for x in self._bars.tasks if x.id == task)

    def _say(self, text: str) -> None:
        if self._bars.disable:
            self.stream.write(f"[{_clock(self._task(self._all).elapsed)}] {text}\n")
            self.stream.flush()
        else:
            self._bars.console.print(text, highlight=False)


def _state_of(run: Run) -> tuple[float, int]:
    try:
        stat = (run.folder / METRICS_FILE).stat()
    except OSError:
        return 0.0, 0
    return stat.st_mtime, stat.st_size


def _iterations(run: Run) -> tuple[int, float]:
    """How far the run says that it is, and its loss there."""
    lines = [line for line in read_json_lines(run.folder / METRICS_FILE) if "total_loss" in line]
    # The line written last, not the highest iteration: a resumed run repeats some.
    return (min(lines[-1]["iteration"] + 1, run.max_iter), lines[-1]["total_loss"]) if lines else (0, math.nan)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
