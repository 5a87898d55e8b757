"""Runs whose numbers go wrong stop with iteration, phase and layer, and leave the last checkpoint alone."""

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from repr_det import Trainer
from repr_det.runs.guard import FiniteGuard, NonFiniteError, non_finite_gradient, non_finite_weight

OPTS = "SOLVER.MAX_ITER 6 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 2 REPR.NUM_CYCLES 1 DATASETS.TEST ()".split()
LAYER = "backbone.bottom_up.res4.0.conv2"


class Poison(HookBase):
    """Puts an infinity into one layer's weight, gradient or input before iteration 3, in the sub-network phase."""

    def __init__(self, where):
        self.where = where

    def before_step(self):
        if self.trainer.iter != 3:
            return
        conv = self.trainer.model.get_submodule(LAYER)
        row = int((conv.weight.flatten(1) != 0).any(1).nonzero()[0])  # a filter that is not dropped
        if self.where == "loss":
            conv.weight.data[row] = float("nan")
        elif self.where == "gradient":
            conv.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([row]), float("inf")))
        else:  # after the backward pass, as an optimizer that overflows would
            self.trainer._trainer.optimizer.register_step_post_hook(
                lambda *_: conv.weight.data[row].fill_(float("inf"))
            )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("loss", f"iteration 3, sub-network phase: the loss is not finite, nor is the weight of {LAYER}.weight"),
        ("gradient", f"iteration 3, sub-network phase: the gradient of {LAYER}.weight is not finite"),
        ("weight", f"iteration 3, sub-network phase: the weight of {LAYER}.weight is not finite"),
    ],
)
def test_stops_with_iteration_phase_and_layer(tiny_cfg, tmp_path, where, expected):
    trainer = Trainer(tiny_cfg(*OPTS, "SOLVER.CHECKPOINT_PERIOD", "1"))
    trainer.register_hooks([Poison(where)])
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = torch.load(tmp_path / "run" / "model_0000002.pth", weights_only=True)["model"]
    assert all(torch.isfinite(t).all() for t in saved.values())


@pytest.mark.parametrize(
    ("weight", "found"),
    [(-3e38, ""), (float("-inf"), "the weight of fc.weight"), (float("nan"), "the weight of fc.weight")],
)
def test_the_first_that_is_not_finite(weight, found):
    """A norm that overflows is no infinity in the weights."""
    net = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    nn.init.constant_(net["fc"].weight, weight)
    assert non_finite_weight(net) == found and non_finite_gradient(net) == ""


def test_gradients_are_looked_at_on_the_cpu_or_when_asked_for(tiny_cfg, monkeypatch):
    """On a GPU a look makes the host wait, in every step."""
    trainer = Trainer(tiny_cfg(*OPTS))
    guard = next(hook for hook in trainer._hooks if isinstance(hook, FiniteGuard))
    assert guard.check_gradients
    looks = []
    monkeypatch.setattr("repr_det.runs.guard.non_finite_weight", lambda model: looks.append(trainer.iter))
    guard.check_gradients = False
    trainer.train()
    assert looks == [1, 3, 5]  # before the drop, the restore and the last checkpoint
