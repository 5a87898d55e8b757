"""Watches a network's training passes until it is proved of each conv whether it can lose filters.

Until a training pass has run, nothing is known. The passes of the first step are traced; a conv that has not run in
them is proved when it first runs.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from repr_det.network.norms import is_norm
from repr_det.network.proof import Verdict, prove
from repr_det.network.tracing import HookOfOne, Trace, TracedPass

_MOST_PASSES = 20  # to be traced for convs that have not run yet
NOT_RUN = Verdict(reason="it has not run in a training pass", ran=False)
COMPUTED = Verdict(reason="its weight is computed from other parameters")


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
        self._tracing = False
        self._handles: list[Any] = []
        self._last: Trace | None = None
        self.trace_next()

    def trace_next(self) -> None:
        """Traces training passes from now on, until ``hear``."""
        if self._tracing:
            return
        self.close()
        self._tracing = True
        watched = {name: module for name, module in self.modules.items() if module._parameters or is_norm(module)}
        around = [name for name in self.modules if any(conv.startswith(name and f"{name}.") for conv in self.convs)]
        self._handles = [TracedPass(watched, [self.modules[name] for name in around], self._look)]

    def hear(self) -> None:
        """Traces no more, once a step has been seen, but the step after one in which a conv first runs."""
        self.news = False
        self.close()
        for name in self.convs if self.traced < _MOST_PASSES else ():
            if not self.verdicts[name].ran:
                hook = HookOfOne(lambda *_: self.trace_next())
                self._handles.append(self.modules[name].register_forward_hook(hook))

    def close(self) -> None:
        """Watches no longer."""
        self._tracing = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def left_out(self) -> list[str]:
        """One sentence for each reason why convs cannot lose filters."""
        names = defaultdict(list)
        for name in self.convs:
            names[self.verdicts.get(name, NOT_RUN).reason].append(name)
        return [f"{', '.join(convs)} ({reason})" for reason, convs in names.items() if reason]

    def others(self) -> list[str]:
        """Names of all trainable convs of the network that could lose filters, by the last pass."""
        convs = [n for n, m in self.modules.items() if isinstance(m, nn.Conv2d) and m.weight.requires_grad]
        return [name for name, verdict in self._proved(convs).items() if not verdict.reason]

    def _proved(self, convs: Sequence[str]) -> dict[str, Verdict]:
        norms = [name for name, module in self.modules.items() if is_norm(module)]
        return {} if self._last is None else prove(self._last, convs, norms)

    def _look(self, trace: Trace) -> None:
        self._last = trace
        for name, verdict in self._proved(self.convs).items():
            now = verdict if "weight" in self.modules[name]._parameters else COMPUTED
            self.verdicts[name] = _both(self.verdicts.get(name, NOT_RUN), now)
        self.trains = self.model.training
        self.traced += 1
        self.news = True


def _both(before: Verdict, now: Verdict) -> Verdict:
    """The verdict of two passes."""
    if not before.ran or (now.ran and now.reason):
        return now
    if not now.ran or before.reason:
        return before
    if now.norm != before.norm:
        return replace(before, reason="several norms follow it")
    return replace(before, readers=before.readers | now.readers, rectified=before.rectified and now.rectified)
