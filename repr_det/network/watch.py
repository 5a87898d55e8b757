"""Watches training passes until each conv is proved or refused.

Those of the first step are traced; for a module that has not run in them, those from its first run to its second.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from repr_det.network.norms import is_norm
from repr_det.network.proof import Reader, Verdict, both, prove
from repr_det.network.tracing import HookOfOne, Trace, TracedPass, is_hooked

logger = logging.getLogger("repr_det.layers")
_MOST_PASSES = 200  # traced for a module that has run once, until it runs again
NOT_RUN = Verdict(reason="it has not run in a training pass", ran=False)
COMPUTED = Verdict(reason="its weight is computed from other parameters")


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for each reason, with the names that have it."""
    names = defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return [f"{', '.join(those)} ({reason})" for reason, those in names.items()]


class Watch:
    """Watches ``model``, which is not wrapped.

    Attributes:
        verdicts: conv name -> what the passes so far have shown; see ``current``.
        trains: the model was in training mode in them.
        waits: the next pass is traced.
        has_news: a pass has been traced, or a module has run for the first time, since ``update``.
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
        self._missed: dict[str, int] = {}  # that ran in another, and the passes traced since
        self._last: Trace | None = None
        self.trace_next()

    def trace_next(self) -> None:
        """Traces training passes from now on, until ``update``."""
        if self.waits:
            return
        self.close()
        self.waits = True
        around = [name for name in self.modules if any(conv.startswith(name and f"{name}.") for conv in self.convs)]
        self._handles = [TracedPass(self.modules, self._watched, [self.modules[name] for name in around], self._prove)]

    def update(self) -> None:
        """Ends the tracing of a step; after the first run of a module those are traced again until it runs in one."""
        self.has_news = False
        self.close()
        if any(self._missed[name] < _MOST_PASSES for name in self._missed.keys() - self._entered):
            self.trace_next()
            return
        for name in self._watched.keys() - self._entered - self._missed.keys():
            hook = HookOfOne(partial(self._has_run, name))
            self._handles.append(self._watched[name].register_forward_hook(hook))

    def _has_run(self, name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._missed.setdefault(name, 0)
            self.has_news = True

    def close(self) -> None:
        self.waits = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        verdicts = {
            name: vars(x) | {"readers": sorted(map(astuple, x.readers)), "held_by": sorted(x.held_by)}
            for name, x in self.verdicts.items()
        }
        state = {"verdicts": verdicts, "traced": self.traced, "trains": self.trains, "waits": self.waits}
        return state | {"entered": sorted(self._entered), "missed": dict(self._missed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the watch of another process was; a state of 0.2.0 does not say it."""
        for name, found in state.get("verdicts", {}).items():
            readers = {Reader(*fields) for fields in found["readers"]}
            self.verdicts[name] = Verdict(**found | {"readers": readers, "held_by": set(found.get("held_by", ()))})
        self.traced, self.trains = state.get("traced", self.traced), state.get("trains", self.trains)
        self._entered, self._missed = set(state.get("entered", self._watched)), dict(state.get("missed", {}))
        self.update()
        if state.get("waits", True):
            self.trace_next()

    def current(self) -> dict[str, Verdict]:
        """The verdicts with the forward hooks that there are now: what they get has left the network."""
        hooked = {name for name, module in self.modules.items() if is_hooked(module)}
        found = {}
        for name in self.convs:
            verdict = self.verdicts.get(name, NOT_RUN)
            if not verdict.reason and (modules := sorted(hooked & verdict.held_by)):
                reason = f"a forward hook of {modules[0]} gets its channels: remove it if it only logs"
                verdict = replace(verdict, reason=reason)
            found[name] = verdict
        return found

    def reasons(self) -> dict[str, str]:
        """Names of the convs that cannot lose filters, and why."""
        return {name: verdict.reason for name, verdict in self.current().items() if verdict.reason}

    def others(self) -> list[str]:
        """Names of the other trainable convs that could lose filters, by the last pass of this process."""
        if self._last is None:
            return []
        modules = [(name, module) for name, module in self.modules.items() if name not in self.convs]
        convs = [name for name, conv in modules if isinstance(conv, nn.Conv2d) and conv.weight.requires_grad]
        return [name for name, verdict in prove(self._last, convs, self._norms).items() if not verdict.reason]

    def _prove(self, trace: Trace) -> None:
        self._last = trace
        self._entered |= trace.entered
        for name in self._missed.keys() - self._entered:
            self._missed[name] += 1
            if self._missed[name] == _MOST_PASSES:
                logger.warning("RePr: %s runs too seldom to be looked at: exclude the convs that it reads", name)
        for name, verdict in prove(trace, self.convs, self._norms).items():
            now = verdict if "weight" in self.modules[name]._parameters else COMPUTED
            self.verdicts[name] = both(self.verdicts.get(name, NOT_RUN), now)
        self.trains = self.model.training
        self.traced += 1
        self.has_news, self.waits = True, False
