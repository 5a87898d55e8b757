"""Exact resume: a run that was killed and resumed ends with the weights of the run that was not.

A checkpoint also holds, of all ranks, random states, positions of the data streams (``loader``) and plain attributes of
modules. If the data order has changed (ranks, workers, batch size, data, sampler, mapper), the run resumes behind as
many images as it has drawn, and one warning names what changed.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from torch import nn

from repr_det.method.errors import UserError
from repr_det.network.state import HiddenState, random_state, set_random_state
from repr_det.runs.checkpoints import is_saved, last_iteration
from repr_det.runs.files import EVENTS_FILE, METRICS_FILE, OVERLAPS_FILE, last_logged, truncate_log
from repr_det.runs.loader import ResumableLoader

logger = logging.getLogger("repr_det.resume")
_OF_THE_MACHINE = ("params", "lr", "foreach", "fused", "capturable", "differentiable")  # of a parameter group
_WINDOW = 20  # iterations that Detectron2's writers smooth over
_NEW_ORDER = "%s: the data order of this run is another one from here on"


class ExactResume(HookBase):
    """Saves and restores what stock checkpoints lack. Belongs right before the PeriodicCheckpointer.

    A resumed run repeats every evaluation after its checkpoint, and gets back the scalars of the last iterations, so
    that metrics.json has every row. Lines after the checkpoint are removed from the logs in OUTPUT_DIR.

    Args:
        model: not wrapped.
        loaders: the training loader, and others that hooks read while training.
    """

    def __init__(self, model: nn.Module, loaders: Sequence[Any]) -> None:
        self.hidden = HiddenState(model)
        self.loaders = [loader for loader in loaders if isinstance(loader, ResumableLoader)]
        self._saved: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None  # until the first step

    def before_train(self) -> None:
        start, loaded = self.trainer.start_iter, self._loaded
        if comm.is_main_process():
            for name in (METRICS_FILE, EVENTS_FILE, OVERLAPS_FILE):  # RePr may be off now
                truncate_log(os.path.join(self.trainer.cfg.OUTPUT_DIR, name), start)
        if loaded is not None and loaded["iteration"] == start - 1:
            self._bring_back(loaded)
            self._bring_back_scalars(loaded["scalars"])
            return
        self._loaded = None
        if start > 0:
            found = "no random states" if loaded is None else f"the random states of iteration {loaded['iteration']}"
            logger.warning(_NEW_ORDER, f"This checkpoint holds {found}")
            for loader in self.loaders:
                loader.skip([], start)

    def _bring_back(self, loaded: dict[str, Any]) -> None:
        ranks = loaded["ranks"]
        rank = comm.get_rank() if len(ranks) == comm.get_world_size() else 0
        if unknown := self.hidden.load(ranks[rank].get("attributes", {})):
            logger.warning("This model has no such attributes: %s; the checkpoint's are ignored", ", ".join(unknown))
        best = self._hooks_of(hooks.BestCheckpointer)
        for hook, (metric, iteration) in zip(best, loaded.get("best", ()), strict=False):
            hook.best_metric, hook.best_iter = metric, iteration

        changes: dict[str, None] = {}
        known = [[state for state in one["loaders"] if state is not None] for one in ranks]  # 0.2.0 has None too
        # A loader that the run did not have before (TEST.PRECISE_BN) begins at its beginning.
        for loader, *states in zip(self.loaders, *known, strict=False):
            if changed := loader.changes(states[rank]):
                changes.update(dict.fromkeys(changed))
                loader.skip(states, self.trainer.start_iter)
            else:
                loader.load_state_dict(states[rank])
        if changes:
            logger.warning(_NEW_ORDER, "; ".join(changes))

    def before_step(self) -> None:
        if self._loaded is None:
            return
        ranks, self._loaded = self._loaded["ranks"], None
        for loader in self.loaders:
            loader.start()
        if len(ranks) == comm.get_world_size():
            set_random_state(ranks[comm.get_rank()]["random"])
        self._evaluate_again()
        self._write_what_was_due()

    def _evaluate_again(self) -> None:
        trainer, iteration = self.trainer, self.trainer.iter
        trainer.iter = trainer.storage.iter = iteration - 1
        for hook in trainer._hooks[trainer._hooks.index(self) :]:  # a checkpoint holds what the others did
            if isinstance(hook, (hooks.EvalHook, hooks.BestCheckpointer)):
                hook.after_step()
        trainer.iter = trainer.storage.iter = iteration

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        periods = [hook._period for hook in self._hooks_of(hooks.EvalHook)]
        # BestCheckpointer saves after an evaluation.
        evaluated = any(period > 0 and done % period == 0 for period in periods)
        if evaluated or is_saved(self.trainer):
            self.collect()

    def collect(self) -> None:
        """Collects the state for a checkpoint, on every rank and before evaluation."""
        self._saved = self._state()

    def _state(self) -> dict[str, Any]:
        loaders = [loader.state_dict() for loader in self.loaders]
        of_this_rank = {"random": random_state(), "loaders": loaders, "attributes": self.hidden.changed()}
        hints, scalars = self.trainer.storage.smoothing_hints(), {}
        for name, history in self.trainer.storage.histories().items():
            if name != "time":  # Detectron2's timer does not count the first iterations
                last = [[value, int(iteration)] for value, iteration in history.values()[-_WINDOW:]]
                scalars[name] = [hints[name], last]
        return {
            "iteration": last_iteration(self.trainer),
            "ranks": comm.gather(of_this_rank),
            "scalars": scalars,
            "best": [[hook.best_metric, hook.best_iter] for hook in self._hooks_of(hooks.BestCheckpointer)],
        }

    def _hooks_of(self, kind: type[HookBase]) -> list[Any]:
        return [hook for hook in self.trainer._hooks if isinstance(hook, kind)]

    def _bring_back_scalars(self, scalars: dict[str, list]) -> None:
        storage, now = self.trainer.storage, self.trainer.storage.iter
        for name, (smoothed, values) in scalars.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = now
        written = last_logged(os.path.join(self.trainer.cfg.OUTPUT_DIR, METRICS_FILE))
        for _, writer in self._json_writers():
            writer._last_write = written
        if self.trainer.start_iter == self.trainer.max_iter:
            self._write_what_was_due()

    def _write_what_was_due(self) -> None:
        """Writes the row of a run that died between its checkpoint and its writers."""
        start = self.trainer.start_iter
        for period, writer in self._json_writers():
            if start % period == 0 or start == self.trainer.max_iter:
                writer.write()

    def _json_writers(self) -> list[tuple[int, JSONWriter]]:
        periodic = self._hooks_of(hooks.PeriodicWriter)
        return [(hook._period, x) for hook in periodic for x in hook._writers if isinstance(x, JSONWriter)]

    def state_dict(self) -> dict[str, Any]:
        """The current state with one process, else that of the last ``collect``."""
        is_training = hasattr(self.trainer, "storage")
        if is_training and comm.get_world_size() == 1 and self._saved.get("iteration") != last_iteration(self.trainer):
            return self._state()
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = self._saved = state


def check_same_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], folder: str) -> None:
    """Raises UserError if ``saved``, from a checkpoint in ``folder``, is of another optimizer or other parameters."""
    own, theirs = optimizer.param_groups, saved["param_groups"]
    same_parameters = [len(group["params"]) for group in own] == [len(group["params"]) for group in theirs]
    if not same_parameters or not theirs[0].keys() <= own[0].keys() | set(_OF_THE_MACHINE):
        raise UserError(
            f"the checkpoint in {folder} is of another optimizer, {_describe(theirs)}; this run has {_describe(own)}: "
            "resume with the same MODEL, MODEL.BACKBONE.FREEZE_AT and SOLVER, or give another OUTPUT_DIR"
        )


def _describe(groups: Sequence[Mapping[str, Any]]) -> str:
    parameters, settings = sum(len(group["params"]) for group in groups), set(groups[0]).difference(_OF_THE_MACHINE)
    return f"{parameters} parameters in {len(groups)} groups with {', '.join(sorted(settings))}"


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of every parameter group, to be read right after the scheduler is built: it moves some of them."""
    return [{key: x for key, x in group.items() if key not in _OF_THE_MACHINE} for group in optimizer.param_groups]


def apply_settings(optimizer: torch.optim.Optimizer, scheduler: Any, built: list, before: list | None) -> list[str]:
    """Applies the settings that the config has changed, and the scheduler's learning rate for the next step.

    Args:
        built: settings of this run.
        before: those of the run that wrote the checkpoint; None takes the loaded ones.

    Returns:
        What changed, as "weight_decay 0.0001 -> 0.001".
    """
    changed: dict[str, None] = {}
    groups = optimizer.param_groups
    saved = [float(group["lr"]) for group in groups]
    for group, own, theirs in zip(groups, built, before or settings_of(optimizer), strict=True):
        for key, value in own.items():
            old = theirs.get(key, value)
            if old == value:
                continue
            changed[f"{key} {old} -> {value}"] = None
            group[key] = value
            if key == "initial_lr":  # torch's own schedulers continue from lr
                group["lr"] *= value / old if old else 0.0
    if changed and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
    if isinstance(scheduler, LRMultiplier):
        for group, rate in zip(groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate
    rates = zip(saved, (group["lr"] for group in groups), strict=True)
    changed |= {f"lr {old:g} -> {new:g}": None for old, new in rates if not math.isclose(old, new)}
    return list(changed)
