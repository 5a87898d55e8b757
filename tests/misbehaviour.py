"""Faults and watchers of a run: functions that a forked command calls before it begins."""

import os
import resource
import signal
import threading
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

import repr_det.method.holding
import repr_det.method.scheme
import repr_det.runs.checkpoints
from repr_det import Trainer
from repr_det.runs.checkpoints import AtomicCheckpointer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: object, name: str, before=lambda *args: None, after=lambda *args: None) -> None:
    """Calls ``before`` and ``after`` with the arguments of ``owner.name``."""
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        before(*args)
        result = original(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, replaced)


def write_often() -> None:
    """Detectron2's writers write every third iteration instead of every twentieth: with a checkpoint, with an
    evaluation, and alone."""
    around(hooks.PeriodicWriter, "__init__", after=lambda hook, *_: setattr(hook, "_period", 3))


def kill_at(moment: str, iteration: int) -> None:
    """SIGKILL the first time that ``moment`` comes at or after ``iteration``; "" for never."""
    write_often()
    now = {"iteration": -1, "calls": 0}
    around(Trainer, "before_train", lambda trainer: now.update(iteration=trainer.start_iter - 1))
    around(Trainer, "run_step", lambda trainer: now.update(iteration=trainer.iter))

    def die_at_call(number):
        def check(*_):
            now["calls"] += now["iteration"] >= iteration
            if now["calls"] > number:
                die()

        return check

    def begin(trainer):
        if trainer.iter >= iteration:
            threading.Timer(0.02, die).start()  # in the middle of the forward pass

    def half(_, file, *__):
        if now["iteration"] >= iteration:
            file.write(b"half a checkpoint" * 1000)
            file.flush()
            die()

    calls = {
        "step": (Trainer, "run_step", begin),
        "before hooks": (Trainer, "after_step", die_at_call(0)),
        "drop": (repr_det.method.holding, "zero_optimizer_state_", die_at_call(3)),  # some layers, others not yet
        "restore": (repr_det.method.scheme, "put_back", die_at_call(3)),
        "evaluation": (COCOEvaluator, "process", die_at_call(2)),
        "tag": (repr_det.runs.checkpoints, "write_atomically", die_at_call(0)),
        "final": (AtomicCheckpointer, "save", lambda _, name: die() if name == "model_final" else None),
        "save": (torch, "save", half),
    }
    if moment in calls:
        around(*calls[moment])


def signal_at(how: str, rank: str, iteration: int, seconds: float, once: str) -> None:
    """Ends something so many seconds after the start of an iteration, once: ``once`` is a file that is made then.

    Args:
        how: kill (SIGKILL to this rank), kill-agent (to it and its parent: torchrun, or the command), TERM or INT (that
            signal to its parent).
        rank: of the process that does it; "any" for the one that comes first.
    """

    def at_once() -> None:
        if how in ("TERM", "INT"):
            os.kill(os.getppid(), signal.Signals[f"SIG{how}"])
            return
        if how == "kill-agent":
            os.kill(os.getppid(), signal.SIGKILL)
        die()

    def begin(trainer):
        if trainer.iter == iteration and rank in ("any", str(comm.get_rank())) and not os.path.exists(once):
            Path(once).touch()
            threading.Timer(seconds, at_once).start()

    around(Trainer, "run_step", begin)


def fill_the_disk() -> None:
    """A limit on the size of files refuses the predictions of an evaluation as a full disk does."""
    evaluate, limits = COCOEvaluator.evaluate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return evaluate(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    COCOEvaluator.evaluate = limited


def model_of(trainer: Trainer) -> torch.nn.Module:
    return getattr(trainer.model, "module", trainer.model)


def tell(file: str, *misbehave: object) -> None:
    """Rank 0 writes what a run begins with."""

    def begin(trainer):
        if trainer.iter == trainer.start_iter and comm.get_rank() == 0:
            torch.save({"model": model_of(trainer).state_dict(), "trainer": trainer.state_dict()}, file)

    around(Trainer, "run_step", begin)
    if misbehave:
        signal_at(*misbehave)


def end_in(folder: str) -> None:
    """Each rank writes the weights that it ends with."""

    def end(trainer):
        torch.save(model_of(trainer).state_dict(), Path(folder) / f"rank{comm.get_rank()}.pth")

    around(Trainer, "after_train", after=end)
