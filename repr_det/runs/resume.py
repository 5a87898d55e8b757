"""Exact resume: a run that was killed and resumed ends with the weights of the run that was not.

Stock Detectron2 restores model, optimizer and iteration, but starts the data order over and forgets every random state.
Here a checkpoint also holds, of all ranks, the random states, the position of the training data stream (how many
samples each loader worker has delivered, its random state before the last of them, and the samples that wait in the
aspect-ratio buckets), and the numbers and tensors that modules keep in plain attributes. An undisturbed run sees
exactly stock Detectron2's batches.

If anything that gives the position its meaning has changed (ranks, workers, batch size, data, sampler, mapper), the run
goes on behind as many images as it has drawn, in another order, with one warning that names what changed.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from torch import nn

from repr_det.network.hidden_state import HiddenState, is_plain
from repr_det.network.state import random_state, set_random_state
from repr_det.runs.files import METRICS_FILE, last_logged, truncate_log
from repr_det.runs.loader import ResumableLoader

logger = logging.getLogger("repr_det.resume")
_WINDOW = 20  # Detectron2's writers smooth over so many iterations


class ExactResume(HookBase):
    """Saves and restores what stock checkpoints lack. Belongs right before the PeriodicCheckpointer.

    Where a checkpoint and an evaluation fall on the same iteration the checkpoint comes first, so a resumed run makes
    that evaluation again: its result is not lost, and it draws the random numbers that it drew before.

    The scalars of the last iterations come back as well, so that metrics.json goes on as if nothing had happened: what
    was evaluated before the checkpoint and not yet written is written later.

    Hooks of other people that count in attributes and have no ``state_dict`` are named in a warning of the resumed run;
    Detectron2's BestCheckpointer, which is one, goes on from its best value.

    Args:
        model: not wrapped in DistributedDataParallel.
        loaders: those that draw training images: the training loader, and others that hooks read while training.
        checkpoint_period: SOLVER.CHECKPOINT_PERIOD.
        eval_period: TEST.EVAL_PERIOD.
        folder: OUTPUT_DIR, whose logs forget what lies after the checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        loaders: Sequence[ResumableLoader | Any],
        checkpoint_period: int,
        eval_period: int,
        folder: str,
    ) -> None:
        self.hidden = HiddenState(model)
        self.loaders = loaders
        self.checkpoint_period = checkpoint_period
        self.eval_period = eval_period
        self.folder = folder
        self._saved: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None  # of this rank, until the first step

    def before_train(self) -> None:
        start = self.trainer.start_iter
        loaded, self._loaded = self._loaded, None
        self._resumed_exactly = loaded is not None and loaded["iteration"] == start - 1
        if self._resumed_exactly:
            self._bring_back(loaded)
        elif start > 0:
            logger.warning(
                "This checkpoint holds %s: the data order of this run is another one from here on",
                "no random states" if loaded is None else f"the random states of iteration {loaded['iteration']}",
            )
            for loader in self._resumable():
                loader.skip([], start)
        self._counts = {hook: _plain(hook) for hook in self.trainer._hooks if _is_foreign(hook)}
        if comm.is_main_process():
            truncate_log(os.path.join(self.folder, METRICS_FILE), start)
        if self._resumed_exactly:
            self._bring_back_scalars(loaded["scalars"])

    def _bring_back(self, loaded: dict[str, Any]) -> None:
        ranks = loaded["ranks"]
        same_world = len(ranks) == comm.get_world_size()
        mine = ranks[comm.get_rank() if same_world else 0]
        if unknown := self.hidden.load(mine.get("attributes", {})):
            logger.warning("This model has no such attributes: %s; the checkpoint's are ignored", ", ".join(unknown))
        if lost := loaded.get("forgotten"):
            logger.warning("No checkpoint holds what these hooks count, so it begins anew: %s", ", ".join(lost))
        for hook, (metric, iteration) in zip(self._best(), loaded.get("best", ()), strict=False):
            hook.best_metric, hook.best_iter = metric, iteration
        self._random = mine["random"] if same_world else None

        # A loader that the run did not have before, for TEST.PRECISE_BN was switched on, begins at its beginning.
        changes: dict[str, None] = {}
        for number, loader in enumerate(self.loaders):
            states = [rank["loaders"][number] for rank in ranks if number < len(rank["loaders"])]
            if not isinstance(loader, ResumableLoader) or not states or None in states:
                continue
            if changed := loader.changes(states[comm.get_rank() if same_world else 0]):
                changes.update(dict.fromkeys(changed))
                loader.skip(states, self.trainer.start_iter)
            else:
                loader.load_state_dict(states[comm.get_rank()])
        if changes:
            logger.warning("%s: the data order of this run is another one from here on", "; ".join(changes))

    def before_step(self) -> None:
        if not self._resumed_exactly:
            return
        self._resumed_exactly = False
        for loader in self._resumable():
            if loader.was_read:
                loader.start()
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        iteration = self.trainer.iter
        if self.eval_period > 0 and iteration % self.eval_period == 0:
            self._evaluate_again(iteration - 1)
        self._write_what_was_due()

    def _evaluate_again(self, iteration: int) -> None:
        evaluation = next((h for h in self.trainer._hooks if isinstance(h, hooks.EvalHook)), None)
        if evaluation is None:
            return
        trainer = self.trainer
        trainer.iter = trainer.storage.iter = iteration
        evaluation._do_eval()
        for hook in self._best():  # it comes after the evaluation, so it had not seen it either
            hook.after_step()
        trainer.iter = trainer.storage.iter = iteration + 1

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # BestCheckpointer saves after an evaluation, on rank 0 alone.
        evaluated = self.eval_period > 0 and done % self.eval_period == 0
        if done % self.checkpoint_period == 0 or done >= self.trainer.max_iter or evaluated:
            self.collect()

    def collect(self) -> None:
        """Collects what a checkpoint of this moment needs; on every rank, and before evaluation."""
        self._saved = self._state(comm.gather(self._of_this_rank()))

    def _of_this_rank(self) -> dict[str, Any]:
        loaders = [x.state_dict() if isinstance(x, ResumableLoader) else None for x in self.loaders]
        return {"random": random_state(), "loaders": loaders, "attributes": self.hidden.changed()}

    def _state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "iteration": self.trainer.iter,
            "ranks": ranks,
            "scalars": _scalars(self.trainer.storage),
            "best": [[hook.best_metric, hook.best_iter] for hook in self._best()],
            "forgotten": [type(hook).__qualname__ for hook, counts in self._counts.items() if _plain(hook) != counts],
        }

    def _resumable(self) -> list[ResumableLoader]:
        return [loader for loader in self.loaders if isinstance(loader, ResumableLoader)]

    def _best(self) -> list[hooks.BestCheckpointer]:
        return [hook for hook in self.trainer._hooks if isinstance(hook, hooks.BestCheckpointer)]

    def _bring_back_scalars(self, scalars: dict[str, list]) -> None:
        storage, now = self.trainer.storage, self.trainer.storage.iter
        for name, (smoothed, values) in scalars.items():
            for value, iteration in values:
                storage.iter = iteration
                storage.put_scalar(name, value, smoothing_hint=smoothed)
        storage.iter = now
        written = last_logged(os.path.join(self.folder, METRICS_FILE))
        for _, writer in self._json_writers():
            writer._last_write = written
        if self.trainer.start_iter == self.trainer.max_iter:
            self._write_what_was_due()

    def _write_what_was_due(self) -> None:
        """The run may have died between the checkpoint and the writers, which come after it."""
        start = self.trainer.start_iter
        for period, writer in self._json_writers():
            if start % period == 0 or start == self.trainer.max_iter:
                writer.write()

    def _json_writers(self) -> list[tuple[int, JSONWriter]]:
        periodic = [hook for hook in self.trainer._hooks if isinstance(hook, hooks.PeriodicWriter)]
        return [(hook._period, x) for hook in periodic for x in hook._writers if isinstance(x, JSONWriter)]

    def state_dict(self) -> dict[str, Any]:
        """Of the iteration that has just been made where that is known: one process can tell it at any time, several
        only where all of them came by here (``after_step``)."""
        running = hasattr(self.trainer, "storage") and hasattr(self, "_counts")
        if running and comm.get_world_size() == 1 and self._saved.get("iteration") != self.trainer.iter:
            return self._state([self._of_this_rank()])
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = self._saved = state


def _scalars(storage: EventStorage) -> dict[str, list]:
    """Name -> [whether it is smoothed, the last values with their iterations], as many as the writers look at."""
    hints = storage.smoothing_hints()
    return {
        name: [hints[name], [[value, int(iteration)] for value, iteration in history.values()[-_WINDOW:]]]
        for name, history in storage.histories().items()
        if name != "time"  # Detectron2's timer does not count the first iterations of a run, resumed or not
    }


def _is_foreign(hook: HookBase) -> bool:
    """Tells whether it is neither Detectron2's nor ours and keeps nothing in a checkpoint."""
    room = type(hook).__module__.partition(".")[0]
    return room not in ("detectron2", "fvcore", "repr_det") and type(hook).state_dict is HookBase.state_dict


def _plain(hook: HookBase) -> dict[str, float]:
    """The numbers in its attributes; what a tensor there holds, by its sum."""
    found = {key: value for key, value in vars(hook).items() if is_plain(value)}
    return {key: float(value.sum()) if hasattr(value, "sum") else value for key, value in found.items()}
