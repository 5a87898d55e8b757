"""Trainers of other people: a Detectron2 loop that is not DefaultTrainer, resumed in the sub-network phase, and
optimizers inside others."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import OmegaConf
from small_loop import TwoConvs, batch
from torch import nn

from repr_det import RePrHook, RePrSchedule, apply_repr
from repr_det.detectron.lazy import repr_cfg_from_lazy

# --- After detrex's trainer: a loop class of its own with gradient clipping, an EMA hook, a LazyConfig, and a
# checkpointer that saves the EMA beside the model.


class LoopOfOnesOwn(SimpleTrainer):
    def __init__(self, model, dataloader, optimizer, clip_grad_params):
        super().__init__(model, dataloader, optimizer)
        self.clip_grad_params = clip_grad_params

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), **self.clip_grad_params)
        self.optimizer.step()
        self._write_metrics(losses, 0.0)


class Ema(HookBase):
    """A checkpointable too: the average's state under the key ``ema_state``."""

    def __init__(self, model):
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def after_step(self):
        for name, value in self.trainer.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value, 0.1)

    def state_dict(self):
        return self.average

    def load_state_dict(self, state):
        self.average = {name: value.clone() for name, value in state.items()}


class Images:
    """Goes on where ``start`` says, which detrex's own loader does not: that is the loader's business, not RePr's."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        for number in itertools.count(self.start):
            yield batch(number)


def lazy_config(folder):
    return OmegaConf.create(
        dict(
            model=LazyCall(TwoConvs)(channels=12),
            optimizer=LazyCall(torch.optim.AdamW)(params=LazyCall(get_default_optimizer_params)(), lr=0.01),
            train=dict(
                device="cpu",
                max_iter=8,
                output_dir=str(folder),
                seed=3,
                clip_grad=dict(params=dict(max_norm=0.1, norm_type=2)),
            ),
            repr=LazyCall(RePrHook)(s1_iters=2, s2_iters=3, num_cycles=1, layers=["backbone.conv*"]),
        ),
        flags={"allow_objects": True},
    )


def do_train(cfg, resume=False, until=None):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    images = Images(0)
    trainer = LoopOfOnesOwn(model, images, optimizer, cfg.train.clip_grad.params)
    ema = Ema(model)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer, ema_state=ema)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            ema,
            hooks.PeriodicCheckpointer(checkpointer, period=4),
            instantiate(cfg.repr) if "_target_" in cfg.repr else RePrHook(repr_cfg_from_lazy(cfg)),
        ]
    )
    checkpointer.resume_or_load("", resume=resume)
    images.start = start = trainer.iter + 1 if resume else 0
    trainer.train(start, until or cfg.train.max_iter)
    return model.state_dict(), ema.average


OLD_NODE = dict(ENABLED=True, S1_ITERS=2, S2_ITERS=3, NUM_CYCLES=1, LAYERS=dict(INCLUDE=["backbone.conv*"]))


def test_a_detectron2_loop_that_is_not_default_trainer(tmp_path):
    """Resumed with the node of version 0.2.0."""
    wanted, wanted_ema = do_train(lazy_config(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "rest", ignore=shutil.ignore_patterns("model_final.pth"))
    (tmp_path / "rest" / "last_checkpoint").write_text("model_0000003.pth")
    saved = torch.load(tmp_path / "rest" / "model_0000003.pth", weights_only=True)
    masks = saved["trainer"]["hooks"]["RePrHook"]["scheme"]["masks"]
    assert sum(int(mask.sum()) for mask in masks.values()) == 7  # floor(0.3 * 24), after iteration 3: 2 to 4 are S2
    assert saved["model"]["backbone.conv1.weight"][masks["backbone.conv1"]].count_nonzero() == 0
    rest = lazy_config(tmp_path / "rest")
    rest.repr = OLD_NODE
    found, found_ema = do_train(rest, resume=True)
    assert_same_weights(found, wanted)
    assert_same_weights(found_ema, wanted_ema)


# --- Steps of the optimizer, where it is inside another and where it takes not every step


def trained_by(step, model: nn.Module, batches: int) -> None:
    for number in range(batches):
        step(model(batch(number))["loss"], number)


def test_accelerates_optimizer_and_accumulated_gradients():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = TwoConvs()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05, 0.9))
    one = apply_repr(model, optimizer, 8, layers=["backbone.*"], schedule=RePrSchedule(3, 2, 1))
    assert type(one.scheme.optimizer) is torch.optim.SGD

    def step(loss, _):
        with accelerator.accumulate(model):
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    trained_by(step, model, 8)
    assert (one.steps, one.phase) == (4, "sub")
    assert sum(layer.weight.flatten(1).any(1).logical_not().sum() for layer in one.scheme.layers) == 7


def test_steps_that_grad_scaler_skips_are_not_counted():
    model = TwoConvs()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    one = apply_repr(model, optimizer, 8, layers=["backbone.*"], schedule=RePrSchedule(3, 2, 1))

    def step(loss, number):
        scaler.scale(loss * (torch.inf if number == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    trained_by(step, model, 3)
    assert (one.steps, one.phase) == (2, "full")
