"""The derived RePr schedule ends before the learning rate decays, under every scheduler that Detectron2 offers."""

import pytest
import torch
from fvcore.common import param_scheduler as fvcore

from repr_det import Trainer
from repr_det.commands.arguments import build_config
from repr_det.detectron.config import decays, validate_repr_config

CONFIG = "configs/repr_r50_fpn.yaml"


def rates(cfg):
    """Of every iteration, as the optimizer has them; the scheduler is asked once more after the last one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = Trainer.build_lr_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("opts", "horizon"),
    [
        ("WarmupMultiStepLR SOLVER.STEPS (600,800)", 600),
        ("WarmupMultiStepLR SOLVER.STEPS (900,2000)", 900),
        ("WarmupMultiStepLR SOLVER.STEPS ()", 1000),
        ("WarmupStepWithFixedGammaLR SOLVER.STEPS (900,) SOLVER.NUM_DECAYS 3", 250),
        ("WarmupCosineLR SOLVER.STEPS (100,)", 500),
    ],
)
def test_restores_fall_at_the_full_rate(opts, horizon):
    solver = f"MODEL.DEVICE cpu SOLVER.MAX_ITER 1000 SOLVER.WARMUP_ITERS 20 SOLVER.LR_SCHEDULER_NAME {opts}"
    cfg = build_config(CONFIG, solver.split())
    schedule, found = validate_repr_config(cfg), rates(cfg)
    assert horizon * 3 // 4 - 9 <= schedule.end_iter <= horizon * 3 // 4
    assert all(found[i] > 0.5 * max(found) for i in schedule.restore_iters)


COSINE, ONE = fvcore.CosineParamScheduler(1.0, 0.0), fvcore.ConstantParamScheduler(1.0)
LAST_STEP = fvcore.CompositeParamScheduler([COSINE, fvcore.ConstantParamScheduler(0.001)], [0.9, 0.1], ["fixed"] * 2)


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (LAST_STEP, (500,)),
        (fvcore.PolynomialDecayParamScheduler(1.0, 2.0), (293,)),  # (1 - x)^2 = 1/2
        (fvcore.StepParamScheduler(5, [1.0, 0.8, 0.3, 0.1, 0.05]), (200, 400, 600, 800)),
        (fvcore.LinearParamScheduler(0.0, 1.0), ()),  # rising
        (ONE, ()),
    ],
)
def test_decays_of_fvcores_schedulers(multiplier, expected):
    assert decays(multiplier, 1000) == pytest.approx(expected, abs=1)
