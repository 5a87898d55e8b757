"""tools/train_net.py that kills itself, or is slow, where the variable MISBEHAVE says so: "kill RANK ITERATION" or
"kill-agent RANK ITERATION" (with the agent that started it), at the first start only, and "term RANK ITERATION"."""

import os
import signal
import sys
import threading
from pathlib import Path

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det import Trainer
from repr_det.commands.processes import run_tool
from repr_det.commands.train import start


def misbehave(how: str, rank: int, iteration: int, once: Path) -> None:
    run_step = Trainer.run_step

    def at_once() -> None:
        if how == "term":
            os.kill(os.getppid(), signal.SIGTERM)
            return
        if how == "kill-agent":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(self):
        if self.iter == iteration and int(os.environ["RANK"]) == rank and not once.exists():
            once.touch()
            threading.Timer(0.02, at_once).start()  # in the middle of a step
        run_step(self)

    Trainer.run_step = counting


if __name__ == "__main__":
    if "MISBEHAVE" in os.environ:
        how, rank, iteration, once = os.environ["MISBEHAVE"].split()
        misbehave(how, int(rank), int(iteration), Path(once))
    sys.argv[0] = "train_net.py"
    run_tool(start)
