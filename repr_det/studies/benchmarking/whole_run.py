"""A whole run of RePr beside one of stock Detectron2, step by step in turn, transitions and calibration included."""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repr_det.method.slim_choice import seconds_of
from repr_det.runs.files import EVENTS_FILE
from repr_det.studies.benchmarking.case import Bench, Case
from repr_det.studies.benchmarking.prediction import SCHEDULES

_MAX_ITER, _FIRST_STEP = SCHEDULES["1x"]
# The shortest that leaves three iterations for each of three cycles.
SHORTEST = 18
_WARM_UP = 2


def measure_run(case: Case, config_file: str, iterations: int, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains both arms for ``iterations``, RePr with REPR.SLIM on the schedule that REPR derives for 1x, scaled down.

    Each iteration runs one step of either arm, the first in turn, on the same batch with the same random numbers.

    Returns:
        "iterations", "s1_iters", "s2_iters", "cycles"; seconds: "stock" and "repr" of all steps, "transitions" of the
        drops and restores, which "repr" includes; "ratio" of repr to stock, "steps_ratio" likewise without transitions,
        and its standard error "error"; "1x": the ratio at 90,000 iterations, where only the transitions weigh less.
    """
    with tempfile.TemporaryDirectory() as folder:
        opts = ["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (iterations * _FIRST_STEP // _MAX_ITER,)]
        opts += ["REPR.SLIM", True, "REPR.REINIT.FROZEN_NORM", "recalibrate", "OUTPUT_DIR", folder]
        with (
            Bench(case, config_file, repr_on=False, opts=opts) as stock,
            Bench(case, config_file, repr_on=True, opts=opts) as ours,
        ):
            ours.hook.scheme.passes = ours.passes()
            schedule = ours.hook.schedule
            seconds: dict[Bench, list[float]] = {stock: [], ours: []}
            for number in range(-_WARM_UP, iterations):
                for bench in (stock, ours) if number % 2 else (ours, stock):
                    bench.trainer.iter = number
                    seconds[bench].append(seconds_of(lambda b=bench, n=number: b.step(n % iterations), case.device))
                if (number + 1) % 10 == 0:
                    report(f"  {number + 1} of {iterations} iterations of either arm")
        events = [json.loads(line) for line in (Path(folder) / EVENTS_FILE).read_text().splitlines()]
    theirs, mine = seconds[stock][_WARM_UP:], seconds[ours][_WARM_UP:]
    transitions = {event["iteration"]: event["seconds"] for event in events}
    plain = [value - transitions.get(number, 0.0) for number, value in enumerate(mine)]
    steps_ratio = sum(plain) / sum(theirs)
    return {
        "iterations": iterations,
        "s1_iters": schedule.s1_iters,
        "s2_iters": schedule.s2_iters,
        "cycles": schedule.num_cycles,
        "stock": sum(theirs),
        "repr": sum(mine),
        "transitions": sum(transitions.values()),
        "ratio": sum(mine) / sum(theirs),
        "steps_ratio": steps_ratio,
        "error": ratio_error(plain, theirs),
        "1x": steps_ratio + sum(transitions.values()) / (sum(theirs) / iterations * _MAX_ITER),
    }


def ratio_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Standard error of the ratio of the two sums over paired samples, linearised (Cochran, Sampling Techniques)."""
    ratio, number = sum(numerators) / sum(denominators), len(denominators)
    residuals = [a - ratio * b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.stdev(residuals) / (number**0.5 * sum(denominators) / number)
