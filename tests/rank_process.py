"""What one of two processes does in test_processes.py; importable, as spawned processes need."""

import argparse
import atexit
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from detectron2.engine import HookBase
from detectron2.utils import comm

from repr_det import Trainer, UserError
from repr_det.commands.arguments import build_config, train_argument_parser
from repr_det.commands.processes import launch_processes, setup


class Misbehave(HookBase):
    """Dies in rank 1, or changes the weights of one layer there, at the start of iteration 1."""

    def __init__(self, how: str) -> None:
        self.how = how

    def before_step(self) -> None:
        if self.trainer.iter == 1 and comm.get_rank() == 1:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                model = getattr(self.trainer.model, "module", self.trainer.model)
                model.backbone.bottom_up.res4[0].conv2.weight *= 1.5


def main_of(args: argparse.Namespace) -> None:
    main(*args.main)
    atexit.register(tell_whether_in_a_group, Path(args.main[0]) / f"exit{comm.get_rank()}.txt")


def tell_whether_in_a_group(told: Path) -> None:
    told.write_text("in a group" if dist.is_initialized() else "alone")


def launch_and_tell(args: argparse.Namespace, told: str) -> None:
    """What a tool does; the one line that it would end with goes to the file ``told``."""
    try:
        launch_processes(main_of, args, "cpu")
    except UserError as error:
        Path(told).write_text(str(error))


def main(folder: str, json_file: str, images: str, opts: list[str], how: str = "") -> None:
    register = [[name, json_file, images] for name in ("tiny_train", "tiny_val")]
    out = ["OUTPUT_DIR", str(Path(folder) / "run")]
    cfg = build_config(str(ROOT / "configs" / "baseline_r50_fpn.yaml"), [*SMALL, *opts, *out], register)
    setup(train_argument_parser().parse_args([]), cfg)
    trainer = Trainer(cfg)
    if how == "channels_last":
        trainer.model.to(memory_format=torch.channels_last)
    elif how:
        trainer.register_hooks([Misbehave(how)])
    trainer.resume_or_load(resume=True)
    try:
        trainer.train()
    except RuntimeError as error:
        if "differs between" not in str(error):
            raise
        (Path(folder) / f"error{comm.get_rank()}.txt").write_text(str(error))
        return
    model = getattr(trainer.model, "module", trainer.model)
    torch.save(model.state_dict(), Path(folder) / f"rank{comm.get_rank()}.pth")
