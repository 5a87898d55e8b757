"""The training command, for yaml configs; a config file in Python goes to ``lazy_train``."""

import argparse
import functools
import importlib
import logging
from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from repr_det.commands.arguments import build_config, train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.commands.processes import launch_processes, may_continue, setup, write_configs
from repr_det.commands.world import check_processes
from repr_det.detectron.engine import Trainer
from repr_det.detectron.hook import RePrHook
from repr_det.detectron.passes import epochs_of, map_dataset
from repr_det.detectron.trackers import check_wandb, tracked
from repr_det.runs.checkpoints import AtomicCheckpointer, find_checkpoint
from repr_det.runs.guard import FiniteGuard
from repr_det.runs.record import RunRecord

logger = logging.getLogger(__name__)


def config_of(args: argparse.Namespace) -> CfgNode:
    return build_config(args.config_file, args.opts, args.register, args.baseline, args.eval_only, args.resume)


def main(args: argparse.Namespace) -> dict:
    """One process of a run: trains and evaluates, or only evaluates."""
    cfg = config_of(args)  # again in every process: data sets are registered per process
    setup(args, cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = tracked(Trainer, args.wandb)(cfg)
    return run_trainer(trainer, args, functools.partial(write_configs, cfg))


def run_trainer(trainer: Trainer, args: argparse.Namespace, write_config: Callable[[Path], None]) -> dict:
    """Trains, with the record of the run and a line that says what it is.

    Args:
        write_config: writes config.yaml, and other files, into a folder.
    """
    if args.check_gradients:
        for hook in trainer._hooks:
            if isinstance(hook, FiniteGuard):
                hook.check_gradients = not trainer.cfg.SOLVER.AMP.ENABLED
    trainer.resume_or_load(resume=args.resume)
    data_sets = (*trainer.cfg.DATASETS.TRAIN, *trainer.cfg.DATASETS.TEST)
    trainer.register_hooks([RunRecord(trainer.cfg.OUTPUT_DIR, write_config, data_sets)])
    logger.info(describe_run(trainer))
    return trainer.train()


def describe_run(trainer: Trainer) -> str:
    """One line: the images and epochs of a run, and whether RePr is on."""
    cfg = trainer.cfg
    line = f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"
    epochs = epochs_of(trainer, None)
    if epochs is not None:
        images = len(map_dataset(trainer._trainer.data_loader))
        line = f"{images} training images, {line}: {epochs:.3g} epochs"
    hook = next((hook for hook in trainer._hooks if isinstance(hook, RePrHook)), None)
    if hook is None:
        return f"{line}; RePr is off: REPR.ENABLED True, or one of the configs repr_*.yaml, switches it on"
    schedule = hook.schedule
    return (
        f"{line}; RePr is on (REPR.ENABLED False switches it off): {cfg.REPR.DROP_RATIO:.0%} of the filters by "
        f"{cfg.REPR.CRITERION}, dropped after iterations {', '.join(map(str, schedule.drop_iters))}, back after "
        f"{', '.join(map(str, schedule.restore_iters))}"
    )


def start(argv: list[str] | None = None) -> None:
    """Parses arguments, checks everything that can be checked, then launches the processes."""
    args = train_argument_parser().parse_args(argv)
    check_wandb(args.wandb)
    if args.config_file.endswith(".py"):
        importlib.import_module("repr_det.commands.lazy_train").start_with(args)
        return
    cfg = config_of(args)
    world = check_processes(args, cfg, cfg.MODEL)
    args.resume = may_continue(args, cfg.OUTPUT_DIR)
    check_run(cfg, args.resume, args.eval_only, world.local_size, world.size)
    if args.eval_only and args.resume and "MODEL.WEIGHTS" in args.opts and find_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            "--resume evaluates the checkpoint of OUTPUT_DIR: MODEL.WEIGHTS %s is not read", cfg.MODEL.WEIGHTS
        )
    launch_processes(main, args, str(cfg.MODEL.DEVICE))
