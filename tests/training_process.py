"""Trains the tiny detector again and again, in forked processes that can be killed at a chosen moment.

Reads one json object a line from stdin: {"opts": [...], "json": path, "images": path, "resume": bool, "kill": null or
{"at": moment, "iteration": i} or {"after_seconds": s}}; answers with the wait status. Imports happen once, before any
computation, so that a fork starts clean and at once.
"""

import json
import os
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(__file__))

import torch
from conftest import ROOT, SMALL
from detectron2.engine import hooks
from detectron2.evaluation import COCOEvaluator

import repr_det.method.holding
import repr_det.method.scheme
import repr_det.runs.checkpoints
from repr_det import Trainer
from repr_det.commands import train
from repr_det.commands.arguments import train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.runs.checkpoints import AtomicCheckpointer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, iteration: int) -> None:
    """Arranges for SIGKILL the first time that ``moment`` comes at or after ``iteration``."""
    now = {"iteration": -1}
    run_step, before_train = Trainer.run_step, Trainer.before_train

    def starting(self):
        now["iteration"] = self.start_iter - 1
        before_train(self)

    def counting(self):
        now["iteration"] = self.iter
        if moment == "step" and self.iter >= iteration:
            # In the middle of the forward pass, in a thread of its own as a signal would.
            threading.Timer(0.05, die).start()
        run_step(self)
        if moment == "before hooks" and self.iter >= iteration:
            die()

    Trainer.run_step, Trainer.before_train = counting, starting

    def armed() -> bool:
        return now["iteration"] >= iteration

    def dying(owner, name, call_first=0):
        original, calls = getattr(owner, name), {"n": 0}

        def replaced(*args, **kwargs):
            if armed():
                calls["n"] += 1
                if calls["n"] > call_first:
                    die()
            return original(*args, **kwargs)

        setattr(owner, name, replaced)

    if moment == "drop":
        dying(repr_det.method.holding, "zero_optimizer_state_", 5)  # some layers are dropped, others not yet
    elif moment == "restore":
        dying(repr_det.method.scheme, "bring_back", 5)
    elif moment == "evaluation":
        dying(COCOEvaluator, "process", 2)
    elif moment == "tag":
        dying(repr_det.runs.checkpoints, "write_atomically")
    elif moment == "final":
        save = AtomicCheckpointer.save

        def unless_final(self, name, **kwargs):
            if name == "model_final":
                die()
            save(self, name, **kwargs)

        AtomicCheckpointer.save = unless_final
    elif moment == "save":
        original = torch.save

        def half(data, file, *args, **kwargs):
            if armed():
                file.write(b"half a checkpoint" * 1000)
                file.flush()
                die()
            return original(data, file, *args, **kwargs)

        torch.save = half


def write_often() -> None:
    """Detectron2's writers every third iteration instead of every twentieth, so that some come with a checkpoint or an
    evaluation and some do not."""
    build_hooks = Trainer.build_hooks

    def built(self):
        found = build_hooks(self)
        for hook in found:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = 3
        return found

    Trainer.build_hooks = built


def run(order: dict) -> None:
    sys.stdout = sys.stderr = open(order["log"], "a", buffering=1)  # noqa: SIM115 - for the life of this process
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    write_often()
    kill = order["kill"] or {}
    if "at" in kill:
        kill_at(kill["at"], kill["iteration"])
    argv = ["--config-file", str(ROOT / "configs" / "baseline_r50_fpn.yaml")]
    for name in ("tiny_train", "tiny_val"):
        argv += ["--register", name, order["json"], order["images"]]
    argv += ["--resume"] if order["resume"] else []
    args = train_argument_parser().parse_args([*argv, *SMALL, *order["opts"]])
    check_run(train.config_of(args), args.resume)
    train.main(args)


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(order)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        if order["kill"] and "after_seconds" in order["kill"]:
            time.sleep(order["kill"]["after_seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": status, "killed": os.WIFSIGNALED(status)}), flush=True)


if __name__ == "__main__":
    serve()
