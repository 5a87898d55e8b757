"""Averages of the weights (EMA, SWA): begin again at every restore, else they mix old and new filters for long."""

import gc
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from repr_det.method.errors import UserError

logger = logging.getLogger("repr_det.scheme")
# Where wrappers (of torch, timm, Ultralytics) keep their model.
_INNER = ("module", "ema", "model", "ema_model", "averaged_model", "average")


class Averages:
    """Modules with the parameters of a model under the same names, or what holds one; UserError for anything else."""

    def __init__(self, given: Sequence[Any], model: nn.Module) -> None:
        if not isinstance(given, Sequence):
            raise UserError(f"averages= must be a list, got {type(given).__name__}")
        self._model = model
        self._given = list(given)
        self._inside = [_module_in(one, model) for one in given]
        self._others: list[tuple[weakref.ref, Tensor]] = []
        self._has_warned = False

    @torch.no_grad()
    def begin_again(self) -> None:
        values = self._model.state_dict()
        for average in self._inside:
            for name, value in average.state_dict().items():
                if name in values and values[name].shape == value.shape:
                    value.copy_(values[name])
        for one in self._given:
            if isinstance(one, AveragedModel):
                one.n_averaged.zero_()  # its next update begins an average of equal weights

    def note_others(self, masks: Mapping[str, Tensor]) -> None:
        """Notes the copies of the model that are not given, with the filters that have just left it (``masks``)."""
        objects = gc.get_objects()
        copies = [one for one in objects if self._is_copy(one)]
        if copies:  # few programs have one, and many have a million objects
            optimizers = [one for one in objects if issubclass(type(one), Optimizer) and "state" in vars(one)]
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            trained = {parameter for group in groups for parameter in group["params"]}
            copies = [one for one in copies if trained.isdisjoint(one.parameters())]
        self._others = [(weakref.ref(one), _dropped(one, masks)) for one in copies]

    def warn_of_others(self, masks: Mapping[str, Tensor]) -> None:
        """Warns once if these have moved in one, and not to the zeros that a snapshot of the model has."""
        if self._has_warned:
            return
        for other, before in self._others:
            one = other()
            now = _dropped(one, masks) if self._is_copy(one) else before
            if now.any() and not torch.equal(now, before):
                self._has_warned = True
                logger.warning(
                    f"RePr: a copy of the model ({type(self._model).__name__}) is updated without gradients: give an "
                    "average of the weights as averages=, or it mixes old and new filters long after a restore"
                )
                return

    def _is_copy(self, one: Any) -> bool:
        # A module whose __init__ has failed has no _parameters.
        if type(one) is not type(self._model) or one is self._model or "_parameters" not in vars(one):
            return False
        is_given = any(one is own for own in self._inside)
        is_copy = _shapes(one.named_parameters()) == _shapes(self._model.named_parameters())
        return is_copy and not is_given and not any(parameter.is_meta for parameter in one.parameters())


def _dropped(copy: nn.Module, masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([copy.get_parameter(f"{x}.weight").detach().cpu()[mask].flatten() for x, mask in masks.items()])


def _shapes(named: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named if not is_lazy(tensor)}  # a lazy one has none yet


def _module_in(holder: Any, model: nn.Module) -> nn.Module:
    wanted = _shapes(model.named_parameters())
    waiting = [holder]
    for _ in range(4):
        for one in waiting:
            if isinstance(one, nn.Module):
                own = _shapes([*one.named_parameters(), *one.named_buffers()])
                if wanted.items() <= own.items():
                    return one
        waiting = [getattr(one, name) for one in waiting for name in _INNER if getattr(one, name, None) is not None]
    raise UserError(
        f"averages= must be models with the parameters of the model, or hold one as {', '.join(_INNER)}, got "
        f"{type(holder).__name__}"
    )
