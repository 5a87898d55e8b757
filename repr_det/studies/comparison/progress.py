"""Progress of several runs, by rich: bars that are redrawn on a terminal, and printed every ten seconds elsewhere."""

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

_COLUMNS = (
    "{task.description}",
    bars.BarColumn(20),
    bars.MofNCompleteColumn(),
    "{task.fields[note]}",
    bars.TimeElapsedColumn(),
    "ETA",
    bars.TimeRemainingColumn(),
)


class Progress:
    """Reads the metrics.json of the runs under way and shows iteration, loss and the time left.

    The first bar counts the iterations of all runs, so the time that it leaves knows how many train at once.

    Args:
        runs: all runs of the comparison.
        stream: where to write.
        interval: seconds between two readings: by default 1 on a terminal, 10 elsewhere.
    """

    def __init__(self, runs: Sequence[Run], stream: TextIO | None = None, interval: float | None = None) -> None:
        console = Console(file=stream or sys.stderr, highlight=False)
        self.interval = interval or (1.0 if console.is_terminal else 10.0)
        self._bars = bars.Progress(*_COLUMNS, console=console, speed_estimate_period=300)
        self._trained = {run: _last_iteration(run)[0] for run in runs}
        self._finished = 0
        self._all = self._bars.add_task("", total=sum(run.max_iter for run in runs), note="")
        self._tasks: dict[Run, bars.TaskID] = {}
        self._next = time.monotonic() + min(self.interval, 2.0)
        self._update_all()
        self._bars.start()

    def skipped(self, runs: Iterable[Run]) -> None:
        """Says which runs are finished already."""
        names = [run.name for run in runs]
        self._finished = len(names)
        self._update_all()
        if names:
            self._bars.console.print(f"finished already: {', '.join(names)}", soft_wrap=True)

    def started(self, run: Run) -> None:
        """Adds the bar of a run."""
        done = self._trained[run]
        self._tasks[run] = self._bars.add_task(run.name, total=run.max_iter, completed=done, note="starting")
        self._bars.console.print(f"{run.name}: started, output in {run.folder}", soft_wrap=True)

    def finished(self, run: Run) -> None:
        """Removes the bar of a run."""
        self._finished += 1
        self._trained[run] = run.max_iter
        self._bars.remove_task(self._tasks.pop(run))
        self._update_all()
        self._bars.console.print(f"{run.name}: done", soft_wrap=True)

    def show(self) -> None:
        """Reads the runs, if it is time to."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.interval
        for run, task in self._tasks.items():
            self._trained[run], loss = _last_iteration(run)
            if self._trained[run]:
                note = f"loss {loss:.3f}" if self._trained[run] < run.max_iter else "final evaluation"
                self._bars.update(task, completed=self._trained[run], note=note)
        self._update_all()
        if not self._bars.console.is_terminal:
            self._bars.console.print(self._bars)

    def close(self) -> None:
        """Leaves the bars as they are."""
        self._bars.stop()

    def _update_all(self) -> None:
        what = f"{self._finished} of {len(self._trained)} runs done"
        self._bars.update(self._all, completed=sum(self._trained.values()), description=what)


def _last_iteration(run: Run) -> tuple[int, float]:
    """The iterations that the run says it has trained, and its loss there."""
    lines = [line for line in read_json_lines(run.folder / METRICS_FILE) if "total_loss" in line]
    # The line written last, not the highest iteration: a resumed run repeats some.
    return (min(lines[-1]["iteration"] + 1, run.max_iter), lines[-1]["total_loss"]) if lines else (0, math.nan)
