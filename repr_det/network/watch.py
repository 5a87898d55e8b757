"""Watches training passes until each conv is proved or refused.

Those of the first step are traced; for a module that has not run in them, those from its first run to its second.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from repr_det.network.norms import is_norm
from repr_det.network.proof import Reader, Verdict, prove
from repr_det.network.tracing import HookOfOne, Trace, TracedPass

_MOST_PASSES = 20  # traced, for modules that have not run yet
NOT_RUN = Verdict(reason="it has not run in a training pass", ran=False)
COMPUTED = Verdict(reason="its weight is computed from other parameters")


class Watch:
    """Watches ``model``, which is not wrapped.

    Attributes:
        verdicts: conv name -> what the passes so far have shown.
        trains: the model was in training mode in them.
        waits: the next pass is traced.
        has_news: a pass has been traced since ``update``.
    """

    def __init__(self, model: nn.Module, convs: Sequence[str]) -> None:
        self.model = model
        self.convs = list(convs)
        # TorchScript takes no hooks; its operations are seen as those of what calls it.
        self.modules = {x: y for x, y in model.named_modules() if not isinstance(y, torch.jit.ScriptModule)}
        self.verdicts: dict[str, Verdict] = {}
        self.traced = 0
        self.trains = True
        self.has_news = self.waits = False
        self._handles: list[Any] = []
        self._norms = [name for name, module in self.modules.items() if is_norm(module)]
        self._watched = {x: y for x, y in self.modules.items() if y._parameters or x in self._norms}
        self._entered: set[str] = set()  # in a traced pass
        self._missed: set[str] = set()  # in another
        self._last: Trace
        self.trace_next()

    def trace_next(self) -> None:
        """Traces training passes from now on, until ``update``."""
        if self.waits:
            return
        self.close()
        self.waits = True
        around = [name for name in self.modules if any(conv.startswith(name and f"{name}.") for conv in self.convs)]
        self._handles = [TracedPass(self._watched, [self.modules[name] for name in around], self._prove)]

    def update(self) -> None:
        """Ends the tracing of a step; after the first run of a module those are traced again until it runs in one."""
        self.has_news = False
        self.close()
        if self.traced >= _MOST_PASSES:
            return
        if self._missed - self._entered:
            self.trace_next()
            return
        for name in self._watched.keys() - self._entered:
            hook = HookOfOne(partial(self._has_run, name))
            self._handles.append(self._watched[name].register_forward_hook(hook))

    def _has_run(self, name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._missed.add(name)
            self.trace_next()

    def close(self) -> None:
        self.waits = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        verdicts = {name: vars(x) | {"readers": sorted(map(astuple, x.readers))} for name, x in self.verdicts.items()}
        state = {"verdicts": verdicts, "traced": self.traced, "trains": self.trains, "waits": self.waits}
        return state | {"entered": sorted(self._entered)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the watch of another process was; a state of 0.2.0 does not say it."""
        for name, found in state.get("verdicts", {}).items():
            self.verdicts[name] = Verdict(**found | {"readers": {Reader(*fields) for fields in found["readers"]}})
        self.traced, self.trains = state.get("traced", self.traced), state.get("trains", self.trains)
        self._entered = set(state.get("entered", self._watched))
        self.update()
        if state.get("waits", True):
            self.trace_next()

    def left_out(self) -> list[str]:
        """One sentence for each reason why convs cannot lose filters."""
        names = defaultdict(list)
        for name in self.convs:
            names[self.verdicts.get(name, NOT_RUN).reason].append(name)
        return [f"{', '.join(convs)} ({reason})" for reason, convs in names.items() if reason]

    def others(self) -> list[str]:
        """Names of the other trainable convs that could lose filters, by the last pass."""
        modules = [(name, module) for name, module in self.modules.items() if name not in self.convs]
        convs = [name for name, conv in modules if isinstance(conv, nn.Conv2d) and conv.weight.requires_grad]
        return [name for name, verdict in prove(self._last, convs, self._norms).items() if not verdict.reason]

    def _prove(self, trace: Trace) -> None:
        self._last = trace
        self._entered |= trace.entered
        for name, verdict in prove(trace, self.convs, self._norms).items():
            now = verdict if "weight" in self.modules[name]._parameters else COMPUTED
            self.verdicts[name] = _both(self.verdicts.get(name, NOT_RUN), now)
        self.trains = self.model.training
        self.traced += 1
        self.has_news, self.waits = True, False


def _both(before: Verdict, now: Verdict) -> Verdict:
    if not before.ran or (now.ran and now.reason):
        return now
    if not now.ran or before.reason:
        return before
    if now.norm != before.norm:
        return replace(before, reason="several norms follow it")
    return replace(before, readers=before.readers | now.readers, rectified=before.rectified and now.rectified)
