"""The convs of a model that take part in RePr: found by name, shown by its training passes.

Until a training pass has run, the candidates are known by name alone. The first one is traced (``proof``); a conv that
has not run in it is proved when it first runs. The first pass of every sub-network is traced again.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from repr_det.method.distributed import world_size
from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer, closest, what_attention_means
from repr_det.method.proof import Verdict, is_norm, prove
from repr_det.method.tracing import HookOfOne, Trace, TracedPass

_MOST_PASSES = 20  # to be traced for convs that have not run yet
_OWNER = "repr_owner"
_NOT_RUN = Verdict(reason="it has not run in a training pass", ran=False)
_COMPUTED = Verdict(reason="its weight is computed from other parameters")


class Participation:
    """Watches training passes of ``model``, those of one step at a time, until all candidates are proved or refused.

    Args:
        model: not wrapped.
        candidates: convs that the user's patterns name.

    Attributes:
        verdicts: conv name -> what the passes so far have shown.
        traced: how many passes have been traced.
        trains: whether the model was in training mode in them.
        news: whether a pass has been traced since ``hear``.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[FilterLayer]) -> None:
        self.model = model
        self.candidates = list(candidates)
        self.verdicts: dict[str, Verdict] = {}
        self.traced = 0
        self.trains = True
        self.news = False
        self.modules = dict(model.named_modules())
        self._waiting: list[Any] = []
        self._last: Any = None
        self._pass: TracedPass | None = None
        self.trace_next()

    def trace_next(self) -> None:
        """Traces training passes from now on, until ``hear``."""
        if self._pass is not None:
            return
        self._forget_waiting()
        watched = {name: module for name, module in self.modules.items() if _is_watched(module)}
        ancestors = {part for layer in self.candidates for part in _ancestors(layer.name)}
        outer = [module for name, module in self.modules.items() if name in ancestors]
        self._pass = TracedPass(watched, outer, self._look)

    def hear(self) -> None:
        """Traces no more, once a step has been seen, but for convs that have not run yet."""
        self.news = False
        self.close()
        if self.traced < _MOST_PASSES:
            self._wait_for_others()

    def close(self) -> None:
        """Watches no longer."""
        if self._pass is not None:
            self._pass.remove()
        self._pass = None
        self._forget_waiting()

    def layers(self) -> list[FilterLayer]:
        """The convs that take part, with their norms and readers, the same on every rank. Collective.

        Raises:
            UserError: no training pass has been seen, or nothing takes part.
        """
        if not self.traced:
            raise OptionError(
                "RePr drops filters where a training pass has shown that this silences them, and no pass of this model "
                "has been seen: give RePr the module that you call, with gradients enabled"
            )
        self.verdicts = self._agreed()
        return self.layers_here()

    def layers_here(self) -> list[FilterLayer]:
        """The same, as far as this rank has seen. Raises UserError: nothing takes part."""
        found = [layer for layer in map(self._proved, self.candidates) if layer is not None]
        if not found:
            reasons = "; ".join(self.left_out())
            others = (
                []
                if self._last is None
                else [name for name, verdict in self._all_verdicts().items() if not verdict.reason]
            )
            nearest = ", ".join(closest([x.name for x in self.candidates], others)[:6])
            raise OptionError(
                f"no filter can be dropped of the convs that {{layers}} names: {reasons}"
                + (f"; these could: {nearest}" if nearest else "")
                + what_attention_means(self.model)
            )
        return found

    def left_out(self) -> list[str]:
        """One sentence for each reason why candidates stay out."""
        names: dict[str, list[str]] = {}
        for layer in self.candidates:
            if reason := self.verdicts.get(layer.name, _NOT_RUN).reason:
                names.setdefault(reason, []).append(layer.name)
        return [f"{', '.join(convs)} ({reason})" for reason, convs in names.items()]

    def _look(self, trace: Trace, left: set[int]) -> None:
        """After a traced pass."""
        norms = [name for name, module in self.modules.items() if is_norm(module)]
        found = prove(trace, left, [layer.name for layer in self.candidates], norms)
        found |= {layer.name: _COMPUTED for layer in self.candidates if "weight" not in layer.conv._parameters}
        for name, verdict in found.items():
            before = self.verdicts.get(name)
            self.verdicts[name] = verdict if before is None else _both(before, verdict)
        self._last = (trace, left, norms)
        self.trains = self.model.training
        self.traced += 1
        self.news = True

    def _wait_for_others(self) -> None:
        """Traces the step after one in which a conv runs that has not run yet."""
        for layer in self.candidates:
            if not self.verdicts[layer.name].ran:
                hook = HookOfOne(lambda *_: self.trace_next())
                self._waiting.append(layer.conv.register_forward_hook(hook))

    def _forget_waiting(self) -> None:
        for handle in self._waiting:
            handle.remove()
        self._waiting = []

    def _agreed(self) -> dict[str, Verdict]:
        """The verdicts of all ranks together: a conv takes part where every rank has shown it."""
        if world_size() == 1:
            return self.verdicts
        everyone: list = [None] * world_size()
        dist.all_gather_object(everyone, self.verdicts)
        agreed = dict(everyone[0])
        for theirs in everyone[1:]:
            for name, verdict in theirs.items():
                if verdict.reason and not agreed[name].reason:
                    agreed[name] = verdict
        return agreed

    def _proved(self, layer: FilterLayer) -> FilterLayer | None:
        verdict = self.verdicts.get(layer.name, _NOT_RUN)
        if verdict.reason:
            return None
        norm = None if verdict.norm is None else self.modules[verdict.norm]
        return FilterLayer(layer.name, layer.conv, norm, verdict.norm, frozenset(verdict.readers), verdict.rectified)

    def _all_verdicts(self) -> dict[str, Verdict]:
        """Of every trainable conv of the model, in the last pass."""
        trace, left, norms = self._last
        convs = [n for n, m in self.modules.items() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        return prove(trace, left, convs, norms)


class Owner:
    """Marks convs as those of one RePrScheme; copies of the convs are free.

    Args:
        scheme: remembered weakly, so that one that is forgotten in the full phase is out of the way.
        layers: whose convs it is.

    Attributes:
        keeps: the scheme while filters are out, which must not be forgotten.

    Raises:
        UserError: one of the convs belongs to another scheme.
    """

    def __init__(self, scheme: Any, layers: Sequence[FilterLayer]) -> None:
        self._scheme = weakref.ref(scheme)
        self.keeps: Any = None
        self._convs = [layer.conv for layer in layers]
        for layer in layers:
            other = vars(layer.conv).get(_OWNER)
            if isinstance(other, Owner) and other._scheme() is not None:
                out = other.keeps is not None
                raise UserError(
                    f"{layer.name} belongs to another RePr already: close() that one first"
                    + (", after finish() brings its filters back" if out else "")
                )
        for conv in self._convs:
            vars(conv)[_OWNER] = self

    def let_go(self) -> None:
        for conv in self._convs:
            if vars(conv).get(_OWNER) is self:
                del vars(conv)[_OWNER]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class Gradients:
    """Remembers which layers have had a gradient: one that gets none could never learn its filters again."""

    def __init__(self, layers: Sequence[FilterLayer]) -> None:
        self._seen: set[str] = set()
        self._handles: dict[str, Any] = {}
        for layer in layers:
            if layer.weight.requires_grad:
                self._handles[layer.name] = layer.weight.register_hook(self._hook_of(layer.name))

    def why_none(self, layer: FilterLayer) -> str | None:
        """A reason where others have had a gradient and this layer has not."""
        missing = bool(self._seen) and layer.name not in self._seen
        return "it has had no gradient" if missing else None

    def close(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _hook_of(self, name: str) -> Any:
        def see(gradient: Tensor) -> None:
            self._seen.add(name)
            if name in self._handles:
                self._handles.pop(name).remove()

        return see


def _both(before: Verdict, now: Verdict) -> Verdict:
    """The verdict of two passes."""
    if not before.ran or (now.ran and now.reason):
        return now if now.ran or not before.ran else before
    if now.ran and not before.reason:
        if now.norm != before.norm:
            return replace(before, reason="several norms follow it")
        return replace(before, readers=before.readers | now.readers, rectified=before.rectified and now.rectified)
    return before


def _is_watched(module: nn.Module) -> bool:
    """Whether operations are to be known by this module: it has weights of its own."""
    return bool(module._parameters) or is_norm(module)


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(len(parts)):
        yield ".".join(parts[:length])
