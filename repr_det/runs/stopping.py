"""Stopping with notice: SIGTERM, SIGUSR1 and Ctrl-C."""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from repr_det.runs.checkpoints import is_saved

STATUS = os.EX_TEMPFAIL  # 75: nothing is wrong, start it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_COPIES = 1.0  # seconds in which one Ctrl-C comes from the terminal and from the launcher
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Asks for SIGTERM when the parent dies (Linux only)."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Stopped(SystemExit):
    """Ends the process with STATUS.

    Args:
        asked: name of the signal.
        together: all ranks end at the same point, and can leave the process group.
    """

    def __init__(self, asked: str, together: bool = False) -> None:
        super().__init__(STATUS)
        self.asked, self.together = asked, together


class _Notice:
    answered = False  # signals come here
    asked = ""  # name of the signal
    since = math.inf  # when the first came
    unsaved = False  # no checkpoint holds the last step

    def __call__(self, number: int, _: object) -> None:
        now = time.monotonic()
        self.asked, self.since = signal.Signals(number).name, min(self.since, now)
        again = number == signal.SIGINT and now - self.since > _COPIES
        if again or not self.unsaved:
            raise Stopped(self.asked)


NOTICE = _Notice()


@contextmanager
def answer_signals(answer: Callable[[int, object], None] = NOTICE) -> Iterator[None]:
    """Lets SIGNALS that are not ignored stop the run: at once if nothing is lost or at a second Ctrl-C, else at the end
    of the step."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows no handlers here
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    answered = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in answered:
        signal.signal(number, answer)
    NOTICE.answered, NOTICE.asked, NOTICE.since, NOTICE.unsaved = True, "", math.inf, False
    try:
        yield
    finally:
        NOTICE.answered = False
        for number in answered:
            signal.signal(number, before[number])


def _keep_out() -> None:
    """Takes loader workers out of the process group that torchrun signals: a worker that dies ends the run."""
    if NOTICE.answered:
        NOTICE.answered = False
        os.setpgid(0, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_keep_out)


def close_writers(trainer: TrainerBase) -> None:
    """Closes the writers of a trainer, which then write no more rows."""
    for hook in trainer._hooks:
        while isinstance(hook, hooks.PeriodicWriter) and hook._writers:
            hook._writers.pop().close()


@dataclass(eq=False)
class StopAtSignal(HookBase):
    """Stops every rank, with a checkpoint, at the end of a step in which any was signalled.

    Comes after the PeriodicCheckpointer and before evaluation.
    """

    prepare: Callable[[], None]  # called on every rank before a checkpoint is written
    _stopping = False

    def before_step(self) -> None:
        NOTICE.unsaved = True

    def after_step(self) -> None:
        if not NOTICE.answered:
            return
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        saved = is_saved(self.trainer)
        self._stopping = any(comm.all_gather(bool(NOTICE.asked)))
        if self._stopping and not saved:
            self.prepare()
            self.trainer.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        if self._stopping and not last:  # else after_train stops
            raise self._stopped()
        NOTICE.unsaved = not saved

    def after_train(self) -> None:
        if not self._stopping:
            return
        comm.synchronize()  # the checkpoint is written
        close_writers(self.trainer)
        raise self._stopped()

    def _stopped(self) -> Stopped:
        return Stopped(NOTICE.asked or "a signal to another process", together=True)
