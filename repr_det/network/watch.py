"""Watches a network's training passes until it is proved of each conv whether it can lose filters.

Until a training pass has run, nothing is known. The passes of the first step are traced; a conv that has not run in
them is proved when it first runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from repr_det.network.norms import is_norm
from repr_det.network.proof import Verdict, prove
from repr_det.network.tracing import HookOfOne, Trace, TracedPass

_MOST_PASSES = 20  # to be traced for convs that have not run yet


class Watch:
    """Watches training passes of ``model``, those of one step at a time, until all convs are proved or refused.

    Args:
        model: not wrapped.
        convs: names of its Conv2d modules.

    Attributes:
        modules: of the model, by name.
        verdicts: conv name -> what the passes so far have shown.
        traced: how many passes have been traced.
        trains: whether the model was in training mode in them.
        news: whether a pass has been traced since ``hear``.
    """

    def __init__(self, model: nn.Module, convs: Sequence[str]) -> None:
        self.model = model
        self.convs = list(convs)
        self.modules = dict(model.named_modules())
        self.verdicts: dict[str, Verdict] = {}
        self.traced = 0
        self.trains = True
        self.news = False
        self._waiting: list[Any] = []
        self._last: tuple[Trace, set[int]] | None = None
        self._pass: TracedPass | None = None
        self.trace_next()

    def trace_next(self) -> None:
        """Traces training passes from now on, until ``hear``."""
        if self._pass is not None:
            return
        self._forget_waiting()
        watched = {name: module for name, module in self.modules.items() if _is_watched(module)}
        ancestors = {part for name in self.convs for part in _ancestors(name)}
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

    def left_out(self) -> list[str]:
        """One sentence for each reason why convs cannot lose filters."""
        names: dict[str, list[str]] = {}
        for name in self.convs:
            if reason := self.verdicts.get(name, NOT_RUN).reason:
                names.setdefault(reason, []).append(name)
        return [f"{', '.join(convs)} ({reason})" for reason, convs in names.items()]

    def others(self) -> list[str]:
        """Names of all trainable convs of the network that could lose filters, by the last pass."""
        if self._last is None:
            return []
        convs = [n for n, m in self.modules.items() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        return [name for name, verdict in prove(*self._last, convs, self._norms()).items() if not verdict.reason]

    def _norms(self) -> list[str]:
        return [name for name, module in self.modules.items() if is_norm(module)]

    def _look(self, trace: Trace, left: set[int]) -> None:
        """After a traced pass."""
        found = prove(trace, left, self.convs, self._norms())
        found |= {name: COMPUTED for name in self.convs if "weight" not in self.modules[name]._parameters}
        for name, verdict in found.items():
            before = self.verdicts.get(name)
            self.verdicts[name] = verdict if before is None else _both(before, verdict)
        self._last = trace, left
        self.trains = self.model.training
        self.traced += 1
        self.news = True

    def _wait_for_others(self) -> None:
        """Traces the step after one in which a conv runs that has not run yet."""
        for name in self.convs:
            if not self.verdicts[name].ran:
                hook = HookOfOne(lambda *_: self.trace_next())
                self._waiting.append(self.modules[name].register_forward_hook(hook))

    def _forget_waiting(self) -> None:
        for handle in self._waiting:
            handle.remove()
        self._waiting = []


NOT_RUN = Verdict(reason="it has not run in a training pass", ran=False)
COMPUTED = Verdict(reason="its weight is computed from other parameters")


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
    """Tells whether operations are to be known by this module: it has weights of its own."""
    return bool(module._parameters) or is_norm(module)


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(len(parts)):
        yield ".".join(parts[:length])
