"""A guard against numbers that are not finite."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import is_saved


class NonFiniteError(UserError, FloatingPointError):
    """A loss, gradient or weight is infinite or NaN."""


@dataclass(eq=False)
class FiniteGuard(HookBase):
    """Stops the run if weights are not finite before a checkpoint or a RePr transition, or gradients after a step.

    Comes before every hook that saves or uses the model.
    """

    check_gradients: bool  # the host waits for each step; False under AMP, where GradScaler skips those that overflow
    repr_hook: Any  # None without RePr

    def after_step(self) -> None:
        if self.check_gradients:
            self._check(non_finite_gradient(self.trainer.model))
        now, hook = self.trainer.iter, self.repr_hook
        is_due = hook is not None and hook.schedule.phase(now) != hook.schedule.phase(now + 1)
        if is_due or is_saved(self.trainer):
            self.check_weights()

    def check_weights(self) -> None:
        self._check(non_finite_weight(self.trainer.model))

    def _check(self, found: str) -> None:
        if found:
            raise NonFiniteError(describe(self.trainer, f"{found} is not finite"))


def non_finite_weight(model: nn.Module) -> str:
    """The first parameter that is not finite, as "the weight of X", else ""."""
    return _first_non_finite("weight", dict(model.named_parameters()))


def non_finite_gradient(model: nn.Module) -> str:
    """The first gradient that is not finite, as "the gradient of X", else ""."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _first_non_finite("gradient", gradients)


def _first_non_finite(what: str, tensors: dict[str, Tensor]) -> str:
    norms = [torch.linalg.vector_norm(tensor.detach(), 1).float() for tensor in tensors.values()]
    if not norms or torch.isfinite(torch.stack(norms).sum()):
        return ""
    for name, tensor in tensors.items():  # a sum may overflow if every entry is finite
        if not torch.isfinite(tensor).all():
            return f"the {what} of {name.removeprefix('module.')}"
    return ""


def describe(trainer: object, what: str) -> str:
    scheme = next((h.scheme for h in trainer._hooks if hasattr(h, "scheme")), None)
    phase = "full-network" if scheme is None or not scheme.is_sub else "sub-network"
    return (
        f"iteration {trainer.iter}, {phase} phase: {what}; the run stops, its last checkpoint is untouched. "
        "Lower SOLVER.BASE_LR, warm up longer, or clip gradients (SOLVER.CLIP_GRADIENTS), then --resume"
    )
