"""tools/train_net.py that dies in the middle of an iteration, once, where the variable MISBEHAVE = "HOW RANK ITERATION
FILE" says so.

HOW is kill (SIGKILL to this rank), kill-agent (to it and what started it: torchrun, or the tool) or term (SIGTERM to
what started it). RANK may be "any". FILE is made so that it happens no second time.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from detectron2.utils import comm

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det import Trainer
from repr_det.commands.processes import run_tool
from repr_det.commands.train import start


def misbehave(how: str, rank: str, iteration: int, once: Path) -> None:
    run_step = Trainer.run_step

    def at_once() -> None:
        if how == "term":
            os.kill(os.getppid(), signal.SIGTERM)
            return
        if how == "kill-agent":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(self):
        if self.iter == iteration and rank in ("any", str(comm.get_rank())) and not once.exists():
            once.touch()
            threading.Timer(0.02, at_once).start()  # in the middle of a step
        run_step(self)

    Trainer.run_step = counting


if "MISBEHAVE" in os.environ:  # in the processes of --num-gpus as well
    how, rank, iteration, once = os.environ["MISBEHAVE"].split()
    misbehave(how, rank, int(iteration), Path(once))

if __name__ == "__main__":
    sys.argv[0] = "train_net.py"
    run_tool(start)
