"""Mixed precision: GradScaler's skipped steps, fp16 and bf16, clipping, accelerate.

Detectron2's AMPTrainer insists on CUDA; without it the same trainer runs here on torch's CPU autocast and GradScaler.
"""

import pytest
import torch
from conftest import GPU, At, assert_same_weights, interrupt
from detectron2.config import get_cfg
from detectron2.engine import AMPTrainer, HookBase
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import seed_all_rng
from small_loop import OPTIONS, TwoConvs, batch

from repr_det import RePrHook, RePrSchedule, Trainer, apply_repr


@pytest.fixture
def cpu_amp(monkeypatch):
    """Makes AMPTrainer run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.amp, "autocast", lambda dtype: torch.autocast("cpu", dtype=dtype))
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu_amp")
    return request.param


def scaler_of(device, scale=2.0**10):
    """Halving would take many steps to leave an overflow: one step back is enough here."""
    return torch.amp.GradScaler(device, init_scale=scale, backoff_factor=2.0**-40)


def trained(device, precision, scale, clip="none", *others: HookBase) -> AMPTrainer:
    """After four full steps and two of the sub-network, and two more."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", clip != "none", "CLIP_TYPE", clip, "CLIP_VALUE", 0.01])
    torch.manual_seed(0)
    model = TwoConvs().to(device)
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(model.parameters(), 0.05, 0.9))
    data = [batch(i).to(device) for i in range(8)]
    trainer = AMPTrainer(model, data, optimizer, grad_scaler=scaler_of(device, scale), precision=precision)
    hook = RePrHook(seed=7, total_steps=8, **OPTIONS)
    trainer.register_hooks([hook, *others])
    trainer.train(0, 8)
    assert hook.scheme.cycle == 1 and not hook.scheme.is_sub
    return trainer


class Watch(HookBase):
    """Overflows the scaled loss at ``overflow`` and keeps what every step left."""

    def __init__(self, overflow):
        self.overflow = overflow
        self.changed, self.dropped, self.scales = [], [], []

    def before_step(self):
        self.scaler = getattr(self.trainer, "_trainer", self.trainer).grad_scaler
        self.before = [parameter.detach().clone() for parameter in self.trainer.model.parameters()]
        if self.trainer.iter == self.overflow:
            self.scaler.update(2.0**40)

    def after_step(self):
        self.changed.append(not all(map(torch.equal, self.trainer.model.parameters(), self.before)))
        self.scales.append(self.scaler.get_scale())
        scheme = next(hook.scheme for hook in self.trainer._hooks if isinstance(hook, RePrHook))
        for layer in scheme.layers if scheme.is_sub else ():
            rows = scheme.masks[layer.name]
            momentum = self.trainer.optimizer.state[layer.weight]["momentum_buffer"]
            self.dropped.append((int(rows.sum()), layer.weight[rows].any() or momentum[rows].any()))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
def test_a_skipped_step_changes_nothing_and_dropped_filters_stay_zero(device, precision):
    overflow = 4 if precision is torch.float16 else None  # bf16 has float32's range
    watch = Watch(overflow)
    trainer = trained(device, precision, 2.0**10, "none", watch)
    assert watch.changed == [i != overflow for i in range(8)]
    assert (watch.scales[4] == 1.0) == (overflow is not None)  # the scaler saw the overflow
    assert sum(count for count, _ in watch.dropped) > 0 and not any(moved for _, moved in watch.dropped)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("clip", ["none", "norm"])
def test_clipping_sees_unscaled_gradients(cpu_amp, clip):
    """Scaling by a power of two is exact in bf16: with and without it the run is the same, bit for bit."""
    ends = [trained("cpu", torch.bfloat16, scale, clip).model.state_dict() for scale in (1.0, 2.0**12)]
    assert_same_weights(*ends)


def test_resumed_under_amp_bit_for_bit(tiny_cfg, tmp_path, cpu_amp):
    opts = "SOLVER.MAX_ITER 6 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1 DATASETS.TEST ()"
    opts = [*opts.split(), "SOLVER.AMP.ENABLED", "True", "SOLVER.CHECKPOINT_PERIOD", "4"]

    def trainer_of(cfg, scale=2.0**10):
        seed_all_rng(5)
        trainer = Trainer(cfg)
        trainer._trainer.precision, trainer._trainer.grad_scaler = torch.float16, scaler_of("cpu", scale)
        return trainer

    ends = []
    for stopped in (False, True):
        cfg = tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / str(stopped))
        trainer = trainer_of(cfg)
        trainer.register_hooks([Watch(overflow=2), *([At(5, interrupt)] if stopped else [])])
        try:
            trainer.train()
        except KeyboardInterrupt:
            trainer = trainer_of(cfg, scale=8.0)  # the checkpoint brings its own
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == 4
            trainer.train()
        ends.append(trainer.model.state_dict())
        assert trainer._trainer.grad_scaler.get_scale() == 1.0
    assert_same_weights(*ends)


def test_accelerates_optimizer_and_accumulated_gradients():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = TwoConvs()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05, 0.9))
    one = apply_repr(model, optimizer, 8, layers=["backbone.*"], schedule=RePrSchedule(3, 2, 1))
    assert type(one.scheme.optimizers[0]) is torch.optim.SGD

    for number in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(number))["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert (one.steps, one.phase) == (4, "sub")
    assert sum(layer.weight.flatten(1).any(1).logical_not().sum() for layer in one.scheme.layers) == 7


def test_steps_that_grad_scaler_skips_are_not_counted():
    model = TwoConvs()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    one = apply_repr(model, optimizer, 8, layers=["backbone.*"], schedule=RePrSchedule(3, 2, 1))

    for number in range(3):
        loss = model(batch(number))["loss"] * (torch.inf if number == 1 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (one.steps, one.phase) == (2, "full")
