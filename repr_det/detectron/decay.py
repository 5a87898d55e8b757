"""When a learning-rate schedule decays, whichever it is: found by asking it."""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, build_lr_scheduler

_STEP = 0.9  # a rate that falls to this share or less from one iteration to the next has stepped
_HALF = 0.5  # a rate that falls gradually has decayed when it is half of what it was


def decays(multiplier: Callable[[float], float], max_iter: int) -> tuple[int, ...]:
    """The iterations at which the rate steps down; where it falls gradually (cosine, linear, ...), also the first at
    which it has fallen to half of its largest value, and none after that.

    Args:
        multiplier: fvcore's ParamScheduler: position in [0, 1) -> multiplier of the rates.
    """
    found: list[int] = []
    peak = before = 0.0
    for iteration in range(max_iter):
        value = float(multiplier(iteration / max_iter))
        stepped = before > 0 and value <= _STEP * before
        halved = not found and peak > 0 and value <= _HALF * peak
        if stepped or halved:
            found.append(iteration)
        if halved and not stepped:
            break
        peak, before = max(peak, value), value
    return tuple(found)


def decays_of_config(cfg: CfgNode) -> tuple[int, ...]:
    """``decays`` of the scheduler that Detectron2 builds for SOLVER."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    logger = logging.getLogger("detectron2.solver.build")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warning of steps beyond MAX_ITER comes when the run builds its own
    try:
        return decays(build_lr_scheduler(cfg, optimizer)._multiplier, cfg.SOLVER.MAX_ITER)
    finally:
        logger.setLevel(level)


def defined_at_its_end(scheduler: LRMultiplier) -> LRMultiplier:
    """Gives a scheduler a rate after the last iteration, which torch asks for and fvcore's equal steps do not have."""
    multiplier = scheduler._multiplier
    scheduler._multiplier = lambda where: multiplier(min(where, 1 - 1e-5))  # beyond fvcore's own tolerance of 1e-6
    return scheduler
