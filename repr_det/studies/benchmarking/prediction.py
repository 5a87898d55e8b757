"""Wall-clock time of a whole RePr run over that of its baseline, from step times and transitions."""

from repr_det.method.schedule import RePrSchedule

# Iterations and first learning-rate step of Detectron2's schedules.
SCHEDULES = {"1x": (90_000, 60_000), "3x": (270_000, 210_000)}


def run_ratio(
    max_iter: int,
    schedule: RePrSchedule,
    full: float,
    sub: float,
    transitions: float = 0.0,
) -> float:
    """(full iterations x ``full`` + sub-network iterations x ``sub`` + cycles x ``transitions``) / ``max_iter``.

    Args:
        max_iter: iterations of the run.
        schedule: its cycles.
        full: time of a step of the full network with RePr on, in steps of the baseline.
        sub: likewise of the sub-network.
        transitions: a drop and a restore, likewise.
    """
    in_sub = schedule.num_cycles * schedule.s2_iters
    return ((max_iter - in_sub) * full + in_sub * sub + schedule.num_cycles * transitions) / max_iter


def predict(full: float, sub: float, transitions: float, num_cycles: int = 3) -> dict[str, float]:
    """Schedule name -> ``run_ratio`` on the schedule that REPR derives."""
    return {
        name: run_ratio(max_iter, RePrSchedule.derive(max_iter, first_step, num_cycles), full, sub, transitions)
        for name, (max_iter, first_step) in SCHEDULES.items()
    }
