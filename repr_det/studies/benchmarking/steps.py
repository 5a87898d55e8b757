"""Step times of stock Detectron2, S1, masked S2 and slim S2, interleaved, and the time spent inside the hook."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from repr_det.method.slim_choice import seconds_of
from repr_det.studies.benchmarking.case import Bench, Case, patched, synthetic_batch
from repr_det.studies.benchmarking.flops import count

STOCK, S1, MASKED, SLIM = "stock", "S1", "S2 masked", "S2 slim"
ARMS = (STOCK, S1, MASKED, SLIM)
_WARM_UP = 2


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    median = statistics.median(values)
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def measure_steps(case: Case, config_file: str, pairs: int, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Every round runs one step of each arm, in an order that turns, on the same batch with the same random numbers.

    Returns:
        "seconds", "ratio" (to stock, round by round): arm -> ``spread``; "hook": arm -> seconds inside the hook a step
        and their share of the arm's median; "flops": see ``flops.count``; "dropped", "filters".
    """
    with ExitStack() as stack:
        stock = stack.enter_context(Bench(case, config_file, repr_on=False))
        full = stack.enter_context(Bench(case, config_file, repr_on=True))
        clock = _Clock(case)
        sub = stack.enter_context(Bench(case, config_file, repr_on=True))
        with clock.on_gradient_hooks():
            dropped = sub.hook.scheme.drop()
        slim = sub.slim()

        def run(arm: str, number: int) -> float:
            bench = {STOCK: stock, S1: full}.get(arm, sub)
            if arm == SLIM:
                slim.install()
            seconds = seconds_of(lambda: bench.step(number), case.device)
            slim.remove()
            return seconds

        for number in range(_WARM_UP):
            for arm in ARMS:
                run(arm, number)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in range(pairs):
            turn = number % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                seconds[arm].append(run(arm, number))
            report(f"  round {number + 1} of {pairs}: " + ", ".join(f"{a} {s[-1]:.3f} s" for a, s in seconds.items()))
        times = {arm: spread(values) for arm, values in seconds.items()}
        return {
            "seconds": times,
            "ratio": {
                arm: spread([a / b for a, b in zip(seconds[arm], seconds[STOCK], strict=True)]) for arm in ARMS[1:]
            },
            "hook": {
                arm: clock.measure(bench, min(pairs, 10), times[arm]["median"])
                for arm, bench in ((S1, full), (MASKED, sub))
            },
            "flops": count(sub, synthetic_batch(case)),
            "dropped": sum(map(len, dropped.dropped.values())),
            "filters": sum(layer.num_filters for layer in sub.hook.scheme.layers),
        }


class _Clock:
    """Adds up the time inside RePrHook's methods and inside the gradient hooks that a drop registers.

    On a GPU every call waits for the kernels before it, so it runs in steps of its own that are not timed.
    """

    def __init__(self, case: Case) -> None:
        self.device = case.device
        self.running = False
        self.seconds = 0.0

    def around(self, function: Callable) -> Callable:
        def timed(*arguments: Any) -> Any:
            if not self.running:
                return function(*arguments)
            result = []
            self.seconds += seconds_of(lambda: result.append(function(*arguments)), self.device)
            return result[0]

        return timed

    def on_gradient_hooks(self) -> Any:
        return patched(
            torch.Tensor, "register_hook", lambda original: lambda tensor, hook: original(tensor, self.around(hook))
        )

    def measure(self, bench: Bench, steps: int, step_seconds: float) -> dict[str, float]:
        values = []
        with ExitStack() as stack:
            for name in ("before_step", "after_backward", "after_step"):
                stack.enter_context(patched(bench.hook, name, self.around))
            self.running = True
            for number in range(steps):
                self.seconds = 0.0
                bench.step(number)
                values.append(self.seconds)
            self.running = False
        seconds = statistics.median(values)
        return {"seconds": seconds, "share": seconds / step_seconds}
