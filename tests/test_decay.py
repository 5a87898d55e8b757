"""The derived RePr schedule ends before the learning rate decays, under every scheduler that Detectron2 offers."""

import pytest
import torch
from detectron2.engine import hooks
from detectron2.solver import LRMultiplier
from fvcore.common import param_scheduler as fvcore
from small_loop import config, small_trainer, train
from torch.optim import lr_scheduler

from repr_det import RePrHook, Trainer, UserError
from repr_det.commands.arguments import build_config
from repr_det.detectron.config import decays, validate_repr_config
from repr_det.method.schedule import RePrSchedule

CONFIG = "configs/repr_r50_fpn.yaml"


def rates(cfg):
    """The optimizer's rate in every iteration; the scheduler is asked once more after the last one."""
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


STEP = fvcore.MultiStepParamScheduler([1, 0.1], milestones=[20], num_updates=40)


def warm(optimizer):
    parts = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.MultiStepLR(optimizer, [15])
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


@pytest.mark.parametrize("first", [False, True], ids=["behind it", "before it"])
@pytest.mark.parametrize(
    ("build", "decay"),
    [
        (lambda optimizer: STEP, 20),
        (lambda optimizer: LRMultiplier(optimizer, STEP, 40), 20),
        (lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [20]), 20),
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda i: (1 - i / 40) ** 2), 12),  # (1 - x)^2 = 1/2
        (warm, 20),
    ],
)
def test_schedule_of_a_hook_by_the_scheduler_of_its_trainer(build, decay, first):
    """Whatever SOLVER of its config says, and when the run is resumed too."""

    def begun(**arguments):
        trainer = small_trainer(steps=40)
        rate = hooks.LRScheduler(trainer.optimizer, build(trainer.optimizer))
        cfg = config(40, num_cycles=1, layers=["backbone.conv*"])
        cfg.SOLVER.LR_SCHEDULER_NAME = "of_ones_own"
        hook = RePrHook(cfg, **arguments)
        trainer.register_hooks([hook, rate] if first else [rate, hook])
        return trainer, hook

    (trainer, hook), (resumed, other), (changed, _) = begun(), begun(), begun(first_lr_step=8)
    train(trainer, stop=12)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05 * (0.7**2 if decay == 12 else 1)  # none played on it
    resumed.model.load_state_dict(trainer.model.state_dict())
    resumed.load_state_dict(trainer.state_dict())
    train(resumed, 12)
    changed.load_state_dict(trainer.state_dict())
    with pytest.raises(UserError, match=r"the checkpoint was trained with REPR\.S1_ITERS \d+, this run has 4"):
        train(changed, 12)
    assert hook.schedule == other.schedule == RePrSchedule.derive(40, decay, 1)


def test_a_scheduler_that_cannot_be_read_is_named_in_the_log(caplog):
    trainer = small_trainer(RePrHook(num_cycles=1, layers=["backbone.conv*"]), steps=40)
    trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, lr_scheduler.ReduceLROnPlateau(trainer.optimizer))])
    with caplog.at_level("INFO", "repr_det.hook"):
        train(trainer, stop=0)
    assert "S1 20, S2 10, 1 cycles" in caplog.text
    assert "no schedule of the learning rate can be read (first_lr_step= says" in caplog.text
