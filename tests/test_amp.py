"""Mixed precision: GradScaler's skipped steps, fp16 and bf16, clipping.

Detectron2's AMPTrainer insists on CUDA. On a machine without it the same trainer runs here on torch's CPU autocast and
CPU GradScaler; the cases marked gpu run on a GPU. What has to be the same bit for bit is asked of the CPU alone.
"""

import pytest
import torch
from conftest import GPU, At, assert_same_weights, interrupt
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det import RePrHook, Trainer

CYCLE = (
    "SOLVER.MAX_ITER 8 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 4 REPR.NUM_CYCLES 1 DATASETS.TEST () "
    "SOLVER.AMP.ENABLED True SOLVER.CHECKPOINT_PERIOD 5"
).split()


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


def trainer_of(cfg, device, precision, scale=2.0**10):
    seed_all_rng(5)
    trainer = Trainer(cfg)
    trainer._trainer.precision = precision
    # Halving would take many steps to leave an overflow: one step back is enough here.
    trainer._trainer.grad_scaler = torch.amp.GradScaler(device, init_scale=scale, backoff_factor=2.0**-40)
    return trainer


def weights(trainer):
    return {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}


class Watch(HookBase):
    """Overflows the scaled loss at iteration 3 (sub-network phase) and keeps what every step left."""

    def __init__(self, overflow):
        self.overflow = overflow
        self.before, self.after, self.dropped_norms, self.scales = {}, {}, [], []

    def before_step(self):
        self.before = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        if self.trainer.iter == 3 and self.overflow:
            self.trainer._trainer.grad_scaler.update(2.0**40)

    def after_step(self):
        now = dict(self.trainer.model.named_parameters())
        self.after[self.trainer.iter] = any(not torch.equal(value, self.before[name]) for name, value in now.items())
        self.scales.append(self.trainer._trainer.grad_scaler.get_scale())
        scheme = next(hook.scheme for hook in self.trainer._hooks if isinstance(hook, RePrHook))
        if 2 <= self.trainer.iter <= 4:  # held by the drop after iteration 1
            for layer in scheme.layers:
                rows = scheme.masks[layer.name]
                momentum = self.trainer.optimizer.state[layer.weight]["momentum_buffer"]
                norm = layer.weight[rows].abs().sum() + momentum[rows].abs().sum()
                self.dropped_norms.append((int(rows.sum()), float(norm)))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
def test_a_skipped_step_changes_nothing_and_dropped_filters_stay_zero(tiny_cfg, device, precision):
    overflow = precision is torch.float16  # bf16 has float32's range
    trainer = trainer_of(tiny_cfg(*CYCLE, "MODEL.DEVICE", device), device, precision)
    watch = Watch(overflow)
    trainer.register_hooks([watch])
    trainer.train()
    assert watch.after == {i: not (overflow and i == 3) for i in range(8)}
    assert (watch.scales[3] == 1.0) == overflow  # the scaler saw the overflow
    assert sum(count for count, _ in watch.dropped_norms) > 0
    assert all(norm == 0 for _, norm in watch.dropped_norms)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert not next(hook.scheme for hook in trainer._hooks if isinstance(hook, RePrHook)).is_sub


@pytest.mark.parametrize("clip", ["none", "value", "norm"])
def test_clipping_sees_unscaled_gradients(tiny_cfg, tmp_path, cpu_amp, clip):
    """Scaling by a power of two is exact in bf16: with and without it the run is the same, bit for bit."""
    opts = [] if clip == "none" else ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip]
    opts += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.01"]
    ends = []
    for scale in (1.0, 2.0**12):
        cfg = tiny_cfg(*CYCLE, *opts, "OUTPUT_DIR", tmp_path / str(scale))
        trainer = trainer_of(cfg, "cpu", torch.bfloat16, scale)
        trainer.train()
        ends.append(weights(trainer))
    assert_same_weights(*ends)


def test_resumed_under_amp_bit_for_bit(tiny_cfg, tmp_path, cpu_amp):
    ends, scales = [], []
    for stopped in (False, True):
        cfg = tiny_cfg(*CYCLE, "OUTPUT_DIR", tmp_path / str(stopped))
        trainer = trainer_of(cfg, "cpu", torch.float16)
        trainer.register_hooks([Watch(overflow=True), *([At(7, interrupt)] if stopped else [])])
        try:
            trainer.train()
        except KeyboardInterrupt:
            trainer = trainer_of(cfg, "cpu", torch.float16, scale=8.0)  # the checkpoint brings its own
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == 5
            trainer.train()
        ends.append(weights(trainer))
        scales.append(trainer._trainer.grad_scaler.get_scale())
    assert scales == [1.0, 1.0]
    assert_same_weights(*ends)
