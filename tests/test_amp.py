"""Mixed precision: GradScaler's skipped steps, fp16 and bf16, clipping, accelerate.

Detectron2's AMPTrainer insists on CUDA; here it runs on torch's CPU autocast and GradScaler. On a GPU: test_gpu.py.
"""

import pytest
import torch
from conftest import At, assert_same_weights, end_of, interrupt
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from small_loop import TwoConvs, batch

from repr_det import RePrHook, RePrSchedule, Trainer, apply_repr


@pytest.fixture
def cpu_amp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.amp, "autocast", lambda dtype: torch.autocast("cpu", dtype=dtype))
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu"))


def scaler_of(scale=2.0**10):
    """Halving would take many steps to leave an overflow: one step back is enough here."""
    return torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-40)


class Overflow(HookBase):
    """Overflows the scaled loss of iteration 3, and keeps whether others moved weights, and dropped ones."""

    def __init__(self):
        self.moved, self.dropped, self.dropped_moved = {}, 0, False

    def before_step(self):
        self.before = [parameter.detach().clone() for parameter in self.trainer.model.parameters()]
        if self.trainer.iter == 3:
            self.trainer._trainer.grad_scaler.update(2.0**40)

    def after_step(self):
        self.moved[self.trainer.iter] = not all(map(torch.equal, self.trainer.model.parameters(), self.before))
        scheme = next(hook.scheme for hook in self.trainer._hooks if isinstance(hook, RePrHook))
        for name, mask in scheme.masks.items():
            weight = self.trainer.model.get_submodule(name).weight
            momentum = self.trainer.optimizer.state[weight]["momentum_buffer"]
            self.dropped += int(mask.sum())
            self.dropped_moved |= bool(weight[mask].any() or momentum[mask].any())


def test_a_skipped_step_changes_nothing_and_a_run_is_resumed_bit_for_bit(tiny_cfg, tmp_path, cpu_amp):
    """fp16, with clipped gradients; the skipped step is in the sub-network phase."""
    opts = "SOLVER.MAX_ITER 7 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 DATASETS.TEST () "
    opts += "SOLVER.AMP.ENABLED True SOLVER.CHECKPOINT_PERIOD 4 SOLVER.CLIP_GRADIENTS.ENABLED True "
    opts += "SOLVER.CLIP_GRADIENTS.CLIP_TYPE norm"

    def trainer_of(cfg, scale=2.0**10):
        seed_all_rng(5)
        trainer = Trainer(cfg)
        trainer._trainer.precision, trainer._trainer.grad_scaler = torch.float16, scaler_of(scale)
        return trainer

    ends = []
    for stopped in (False, True):
        cfg = tiny_cfg(*opts.split(), "OUTPUT_DIR", tmp_path / str(stopped))
        trainer, overflow = trainer_of(cfg), Overflow()
        trainer.register_hooks([overflow, *([At(5, interrupt)] if stopped else [])])
        try:
            trainer.train()
        except KeyboardInterrupt:
            trainer = trainer_of(cfg, scale=8.0)  # the checkpoint brings its own
            trainer.resume_or_load(resume=True)
            assert trainer.start_iter == 4
            trainer.train()
        assert overflow.moved == {number: number != 3 for number in overflow.moved}
        assert overflow.dropped > 0 and not overflow.dropped_moved
        assert trainer._trainer.grad_scaler.get_scale() == 1.0
        ends.append(trainer.model.state_dict())
    assert_same_weights(*ends)


@pytest.mark.parametrize("before", [False, True])
def test_mixed_precision_may_be_switched_at_a_resume(tiny_cfg, cpu_amp, before):
    opts = "SOLVER.MAX_ITER 4 SOLVER.CHECKPOINT_PERIOD 2 DATASETS.TEST () SOLVER.AMP.ENABLED".split()
    with pytest.raises(KeyboardInterrupt):
        end_of(tiny_cfg(*opts, before), At(2, interrupt))
    assert all(value.isfinite().all() for value in end_of(tiny_cfg(*opts, not before), resume=True).values())


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
