"""tools/train_net.py that dies so many seconds after the start of an iteration, once, where the variable MISBEHAVE =
"HOW RANK ITERATION SECONDS FILE" says so.

HOW is kill (SIGKILL to this rank), kill-agent (to it and what started it: torchrun, or the tool) or term (SIGTERM to
what started it). RANK may be "any". FILE is made so that it happens no second time.

TELL = "FOLDER" writes what a run begins with (FOLDER/start.pth) and the images that each rank trains on, a line an
iteration (FOLDER/rank0.json). LAZY = "1" is tools/lazyconfig_train_net.py.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det import Trainer
from repr_det.commands import lazy_train, train
from repr_det.commands.processes import run_tool


def misbehave(how: str, rank: str, iteration: int, seconds: float, once: Path) -> None:
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
            threading.Timer(seconds, at_once).start()
        run_step(self)

    Trainer.run_step = counting


def tell(folder: Path) -> None:
    run_step, forward = Trainer.run_step, GeneralizedRCNN.forward

    def telling(self):
        if self.iter == self.start_iter and comm.get_rank() == 0:
            model = getattr(self.model, "module", self.model).state_dict()
            torch.save({"model": model, "trainer": self.state_dict()}, folder / "start.pth")
        run_step(self)

    def listing(self, batch):
        if self.training:
            with open(folder / f"rank{comm.get_rank()}.json", "a") as file:
                file.write(json.dumps([image["image_id"] for image in batch]) + "\n")
        return forward(self, batch)

    Trainer.run_step, GeneralizedRCNN.forward = telling, listing


if "TELL" in os.environ:
    tell(Path(os.environ["TELL"]))
if "MISBEHAVE" in os.environ:  # in the processes of --num-gpus as well
    how, rank, iteration, seconds, once = os.environ["MISBEHAVE"].split()
    misbehave(how, rank, int(iteration), float(seconds), Path(once))

if __name__ == "__main__":
    sys.argv[0] = "train_net.py"
    run_tool(lazy_train.start if "LAZY" in os.environ else train.start)
