"""The learning-rate warm-up after a restore in Detectron2 trainers; how filters return: test_returning.py."""

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver import build_lr_scheduler
from small_loop import config, small_trainer, train
from torch import nn

from repr_det import RePrHook, Trainer


class Rates(HookBase):
    """Those with which the optimizer steps, and those of the schedule."""

    def before_train(self):
        self.used, self.stock = [], []
        self.trainer.optimizer.register_step_pre_hook(lambda opt, *_: self.used.append(opt.param_groups[0]["lr"]))

    def before_step(self):
        self.stock.append(self.trainer.optimizer.param_groups[0]["lr"])


def test_warm_up_after_every_restore(tiny_cfg, tmp_path):
    """The rates with which the optimizer steps; logs, schedule and checkpoints keep the stock ones."""

    opts = "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 2".split()
    opts += ["DATASETS.TEST", "()"]
    trainer = Trainer(tiny_cfg(*opts, "REPR.REINIT.WARMUP_ITERS", 3))
    rates = Rates()
    trainer.register_hooks([rates])
    trainer.train()
    plain = Trainer(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "plain"))
    others = Rates()
    plain.register_hooks([others])
    plain.train()
    assert rates.stock == others.stock == others.used
    # Restores after iterations 3 and 7: 1/4, 2/4, 3/4 of the rate from 4 and from 8 on.
    shares = [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5, 0.75, 1]
    assert rates.used == pytest.approx([a * b for a, b in zip(shares, rates.stock, strict=True)])


class ClippingSGD(torch.optim.SGD):
    """As Detectron2's projects write it. A plain SGD exists too: RePrHook asks one for the schedule."""

    def step(self, closure=None):
        return super().step(closure)


class RatesAtTheWork(ClippingSGD):
    """The rates with which parameters are moved, behind all hooks."""

    def _init_group(self, group, *lists):
        self.used = [*getattr(self, "used", []), float(group["lr"])]
        return super()._init_group(group, *lists)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_warm_up_of_other_optimizers(tiny_cfg, tmp_path, rate, scheduled):
    """``step`` calls that of its base, or the rate is a tensor, which compiled optimizers keep."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 1))
    model = nn.ModuleDict({"net": net})
    model.forward = lambda x: {"loss": net(x).sigmoid().mean()}
    rate = rate.clone() if torch.is_tensor(rate) else rate
    opts = "SOLVER.MAX_ITER 16 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () REPR.S1_ITERS 3 REPR.S2_ITERS 3".split()
    opts += ["SOLVER.BASE_LR", 0.1, "REPR.ENABLED", True, "REPR.NUM_CYCLES", 1, "REPR.REINIT.WARMUP_ITERS", 3]
    cfg = tiny_cfg(*opts, "REPR.LAYERS.INCLUDE", ["net.0"])
    optimizer = RatesAtTheWork(model.parameters(), lr=rate)
    trainer = SimpleTrainer(model, 20 * [torch.randn(2, 3, 8, 8)], optimizer)
    trainer.register_hooks([RePrHook(cfg)])
    if scheduled:
        trainer.register_hooks([hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    trainer.train(0, 12)
    shares = [1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    assert optimizer.used == pytest.approx([0.1 * share for share in shares])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert not torch.is_tensor(rate) or optimizer.param_groups[0]["lr"] is rate


def test_no_warm_up_where_nothing_came_back_and_the_same_one_in_a_resumed_run(tiny_cfg, tmp_path):
    opts = "SOLVER.MAX_ITER 12 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () SOLVER.BASE_LR 0.001 REPR.ENABLED True".split()
    opts += "REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 REPR.REINIT.WARMUP_ITERS -1 DATASETS.TEST ()".split()

    def train(name, *own, until=12, resume=False):
        trainer, rates = Trainer(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / name, *own)), Rates()
        trainer.register_hooks([rates])
        trainer.resume_or_load(resume)
        trainer.max_iter = until
        trainer.train()
        (scheme,) = (hook.scheme for hook in trainer._hooks if isinstance(hook, RePrHook))
        return rates.used, scheme

    used, scheme = train("nothing", "REPR.CRITERION", "redundant")
    assert used == 12 * [0.001] and scheme.cycle == 1 and scheme.num_returned == 0  # stock training
    expected = [0.001 * share for share in (1, 1, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1)]
    used, scheme = train("whole")
    assert used == pytest.approx(expected) and scheme.num_returned > 0
    state = scheme.state_dict()
    del state["returned"]  # of version 0.1.0
    scheme.load_state_dict(state)
    assert scheme.num_returned > 0

    first, _ = train("stopped", "SOLVER.CHECKPOINT_PERIOD", "7", until=7)
    second, _ = train("stopped", "SOLVER.CHECKPOINT_PERIOD", "7", resume=True)
    assert (len(first), first + second) == (7, pytest.approx(expected))


@pytest.mark.parametrize(
    "opts, length",
    [
        (["REPR.REINIT.WARMUP_ITERS", "0"], 0),
        (["REPR.REINIT.WARMUP_ITERS", "7"], 7),
        (["REPR.REINIT.WARMUP_ITERS", "-1"], 3),  # as long as the filters were out
        (["REPR.REINIT.WARMUP_ITERS", "-1", "REPR.S1_ITERS", "0", "REPR.S2_ITERS", "0"], None),  # derived phases
        (["REPR.REINIT.WARMUP_ITERS", "7", "SOLVER.REFERENCE_WORLD_SIZE", "2"], 14),
        (["REPR.REINIT.WARMUP_ITERS", "-1", "SOLVER.REFERENCE_WORLD_SIZE", "2"], 6),
    ],
)
def test_length_of_the_warm_up(opts, length):
    cfg = config(120, s1_iters=6, s2_iters=3, layers=["backbone.conv*"])
    cfg.merge_from_list(opts)
    hook = RePrHook(cfg)
    train(small_trainer(hook, steps=240), stop=1)
    assert hook.repr.warmup_iters == (hook.schedule.s2_iters if length is None else length)
    assert length is not None or 0 < hook.schedule.s2_iters != 3
