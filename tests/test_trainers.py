"""Trainers of other people: a Detectron2 loop that is not DefaultTrainer, resumed in the sub-network phase, and
optimizers inside others."""

import pytest
import torch
from conftest import assert_same_weights
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import OmegaConf
from small_loop import TwoConvs, batch
from torch import nn

from repr_det import RePrHook, RePrSchedule, apply_repr
from repr_det.detectron.lazy import repr_cfg_from_lazy


class LoopOfOnesOwn(SimpleTrainer):
    """After detrex's trainer: with gradient clipping, built from a LazyConfig."""

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self._write_metrics(losses, 0.0)


def do_train(folder, hook, resume=False):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    model = TwoConvs()
    parameters = LazyCall(get_default_optimizer_params)(model=model)
    optimizer = instantiate(LazyCall(torch.optim.AdamW)(params=parameters, lr=0.01))
    trainer = LoopOfOnesOwn(model, [], optimizer)
    checkpointer = DetectionCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks([hooks.IterationTimer(), hooks.PeriodicCheckpointer(checkpointer, period=4), hook])
    checkpointer.resume_or_load("", resume=resume)
    start = trainer.iter + 1 if resume else 0
    trainer.data_loader = [batch(number) for number in range(start, 8)]
    trainer.train(start, 8)
    return model.state_dict()


def test_a_detectron2_loop_that_is_not_default_trainer(tmp_path):
    """Resumed with the node of version 0.2.0."""
    layers = ["backbone.conv*"]
    node = LazyCall(RePrHook)(s1_iters=2, s2_iters=3, num_cycles=1, layers=layers, output_dir=str(tmp_path), seed=3)
    wanted = do_train(tmp_path / "run", instantiate(node))
    saved = torch.load(tmp_path / "run" / "model_0000003.pth", weights_only=True)
    masks = saved["trainer"]["hooks"]["RePrHook"]["scheme"]["masks"]
    assert sum(int(mask.sum()) for mask in masks.values()) == 7  # floor(0.3 * 24), after iteration 3: 2 to 4 are S2
    assert saved["model"]["backbone.conv1.weight"][masks["backbone.conv1"]].count_nonzero() == 0
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    old_node = dict(ENABLED=True, S1_ITERS=2, S2_ITERS=3, NUM_CYCLES=1, LAYERS=dict(INCLUDE=layers))
    train = dict(max_iter=8, output_dir=str(tmp_path / "run"), seed=3)
    hook = RePrHook(repr_cfg_from_lazy(OmegaConf.create(dict(repr=old_node, train=train))))
    assert_same_weights(do_train(tmp_path / "run", hook, resume=True), wanted)


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
