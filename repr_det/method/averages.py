"""Averages of the weights (EMA, SWA) beside a model: they begin again from the model at every restore.

An average lags behind: long after a restore it holds a mixture of a filter that is gone and one that is new, which is
neither. Measured against other ways in docs/evidence/averages.py.
"""

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from repr_det.method.errors import UserError

# Where wrappers keep their model: torch's AveragedModel and timm's ModelEmaV3, Ultralytics' ModelEMA, hooks.
_INNER = ("module", "ema", "model", "ema_model", "averaged_model", "average")


class Averages:
    """The averages that follow a model: modules with its parameters under the same names, or objects that hold one.

    Raises:
        UserError: one of them holds no such module.
    """

    def __init__(self, given: Sequence[Any], model: nn.Module) -> None:
        self._model = model
        self._given = list(given)
        self._inside = [_module_in(one, model) for one in given]
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._copies: list[tuple[weakref.ref, Tensor]] = []

    @torch.no_grad()
    def begin_again(self) -> None:
        """Sets the averages to the model."""
        values = self._model.state_dict()
        for average in self._inside:
            for name, value in average.state_dict().items():
                if name in values and values[name].shape == value.shape:
                    value.copy_(values[name])
        for one in self._given:
            if isinstance(one, AveragedModel):  # an average of equal weights begins again with its next update
                one.n_averaged.zero_()

    def not_given(self) -> str | None:
        """The class of a copy of the model that has moved without gradients since the last call, as averages do."""
        moved = None
        for copy, before in self._copies:
            module = copy()
            if module is not None and not torch.equal(self._sample(module), before):
                moved = type(module).__name__
        same = [one for one in gc.get_objects() if type(one) is type(self._model) and one is not self._model]
        others = [one for one in same if "_parameters" in vars(one)]  # not one whose __init__ has failed
        wanted = _shapes(self._model)
        copies = [one for one in others if _shapes(one) == wanted and not any(one is own for own in self._inside)]
        without = [one for one in copies if all(p.grad is None and not p.is_meta for p in one.parameters())]
        self._copies = [(weakref.ref(one), self._sample(one)) for one in without]
        return moved

    def _sample(self, module: nn.Module) -> Tensor:
        return module.get_parameter(self._trained[0]).detach().to("cpu", copy=True)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Those of its parameters; lazy ones have none yet."""
    return {name: parameter.shape for name, parameter in module.named_parameters() if not is_lazy(parameter)}


def _module_in(holder: Any, model: nn.Module) -> nn.Module:
    """The module of the same parameters: ``holder`` itself, or what it holds."""
    wanted = _shapes(model)
    waiting = [holder]
    for _ in range(4):
        found = []
        for one in waiting:
            if isinstance(one, nn.Module) and _has(one, wanted):
                return one
            found += [getattr(one, name) for name in _INNER if getattr(one, name, None) is not None]
        waiting = found
    raise UserError(
        f"averages= must be models with the parameters of the model that is trained, or hold one "
        f"({', '.join(_INNER)}), got {type(holder).__name__}"
    )


def _has(module: nn.Module, wanted: Mapping[str, torch.Size]) -> bool:
    own = _shapes(module) | {name: buffer.shape for name, buffer in module.named_buffers()}
    return all(own.get(name) == shape for name, shape in wanted.items())
