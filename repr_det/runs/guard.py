"""Stops a run whose numbers go wrong, before they reach a checkpoint."""

from collections.abc import Callable, Iterable

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from repr_det.method.errors import UserError


class NonFiniteError(UserError, FloatingPointError):
    """A loss, gradient or weight is infinite or NaN."""


class FiniteGuard(HookBase):
    """Stops the run with iteration, phase and layer if weights are not finite before a checkpoint or a RePr transition,
    or gradients after a step.

    Comes before every hook that saves or uses the model, so the last checkpoint stays good. Under AMP a gradient may
    overflow (GradScaler skips that step), so gradients are not looked at.

    Args:
        check_gradients: whether gradients are looked at, for which the host waits once a step; False under AMP.
        weights_at: iteration -> whether the weights are looked at after it.
    """

    def __init__(self, check_gradients: bool, weights_at: Callable[[int], bool]) -> None:
        self.check_gradients = check_gradients
        self.weights_at = weights_at

    def after_step(self) -> None:
        model = self.trainer.model
        if self.check_gradients:
            self._check(_gradients(model), "gradient")
        if self.weights_at(self.trainer.iter):
            self.check_weights()

    def check_weights(self) -> None:
        self._check(dict(self.trainer.model.named_parameters()), "weight")

    def _check(self, tensors: dict[str, Tensor], what: str) -> None:
        if not tensors or all_finite(tensors.values()):
            return
        # A sum may overflow if every entry is finite: only an entry that is not stops the run.
        if name := _first_not_finite(tensors):
            raise NonFiniteError(describe(self.trainer, f"the {what} of {name} is not finite"))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tells whether the L1 norm of every tensor is finite."""
    norms = [torch.linalg.vector_norm(tensor.detach(), 1).float() for tensor in tensors]
    return bool(torch.isfinite(torch.stack(norms).sum()))


def first_non_finite(model: nn.Module) -> str | None:
    """The first parameter whose value, else whose gradient, is not finite."""
    for what, tensors in (("weight", dict(model.named_parameters())), ("gradient", _gradients(model))):
        if name := _first_not_finite(tensors):
            return f"the {what} of {name}"
    return None


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    found = (name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    return next((name.removeprefix("module.") for name in found), None)


def describe(trainer: object, what: str) -> str:
    """One line: what, iteration, phase, and what to do."""
    scheme = next((h.scheme for h in trainer._hooks if hasattr(h, "scheme")), None)
    phase = "full-network" if scheme is None or not scheme.is_sub else "sub-network"
    return (
        f"iteration {trainer.iter}, {phase} phase: {what}; the run stops, its last checkpoint is untouched. "
        "Lower SOLVER.BASE_LR, warm up longer, or clip gradients (SOLVER.CLIP_GRADIENTS), then --resume"
    )
