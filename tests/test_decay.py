"""The derived RePr schedule ends before the learning rate decays, under every scheduler that Detectron2 offers."""

import pytest
import torch
from fvcore.common import param_scheduler as fvcore

from repr_det import Trainer, UserError
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
    "name, opts, first",
    [
        ("WarmupMultiStepLR", ["SOLVER.STEPS", "(600, 800)"], 600),
        ("WarmupMultiStepLR", ["SOLVER.STEPS", "(900, 2000)"], 900),
        ("WarmupMultiStepLR", ["SOLVER.STEPS", "()"], None),
        ("WarmupMultiStepLR", ["SOLVER.STEPS", "(600, 800)", "SOLVER.GAMMA", "0.8"], 600),
        ("WarmupStepWithFixedGammaLR", ["SOLVER.STEPS", "(900,)", "SOLVER.NUM_DECAYS", "3"], 250),
        ("WarmupStepWithFixedGammaLR", ["SOLVER.STEPS", "(100,)", "SOLVER.NUM_DECAYS", "1"], 500),
        ("WarmupCosineLR", ["SOLVER.STEPS", "(100,)"], 500),
    ],
)
def test_restores_fall_at_the_full_rate(name, opts, first):
    solver = ["SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "20", "SOLVER.LR_SCHEDULER_NAME", name]
    cfg = build_config(CONFIG, [*solver, *opts, "MODEL.DEVICE", "cpu"])
    schedule, found = validate_repr_config(cfg), rates(cfg)
    horizon = first or 1000
    assert horizon * 3 // 4 - 9 <= schedule.end_iter <= horizon * 3 // 4
    assert all(found[i] > 0.5 * max(found) for i in schedule.restore_iters)


def test_an_unknown_scheduler_is_named():
    cfg = build_config(CONFIG, ["SOLVER.LR_SCHEDULER_NAME", "Warmup"])
    with pytest.raises(UserError, match=r"SOLVER\.LR_SCHEDULER_NAME Warmup: Unknown LR scheduler"):
        validate_repr_config(cfg)


def composite(first, second, length, scaling):
    return fvcore.CompositeParamScheduler([first, second], lengths=[length, 1 - length], interval_scaling=[scaling] * 2)


COSINE, ONE = fvcore.CosineParamScheduler(1.0, 0.0), fvcore.ConstantParamScheduler(1.0)
SMALL = fvcore.ConstantParamScheduler(0.001)


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        (composite(ONE, COSINE, 0.6, "rescaled"), (800,)),
        (composite(COSINE, SMALL, 0.9, "fixed"), (500,)),  # with a last step
        (fvcore.LinearParamScheduler(1.0, 0.0), (500,)),
        (fvcore.PolynomialDecayParamScheduler(1.0, 2.0), (293,)),  # (1 - x)^2 = 1/2
        (fvcore.ExponentialParamScheduler(1.0, 0.01), (151,)),  # 0.01^x = 1/2
        (fvcore.StepParamScheduler(5, [1.0, 0.6, 0.3, 0.1, 0.05]), (200, 400, 600, 800)),
        (fvcore.LinearParamScheduler(0.0, 1.0), ()),  # rising
        (ONE, ()),
    ],
)
def test_decays_of_fvcores_schedulers(multiplier, expected):
    assert decays(multiplier, 1000) == pytest.approx(expected, abs=1)
