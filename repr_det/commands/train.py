"""The training command for yaml configs."""

import argparse
import functools

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from repr_det.commands.arguments import build_config, train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.commands.processes import launch_processes, may_continue, setup, write_configs
from repr_det.commands.world import check_processes
from repr_det.detectron.engine import Trainer
from repr_det.detectron.trackers import check_wandb, tracked
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.record import RunRecord


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
    trainer.resume_or_load(resume=args.resume)
    data_sets = (*trainer.cfg.DATASETS.TRAIN, *trainer.cfg.DATASETS.TEST)
    trainer.register_hooks([RunRecord(cfg.OUTPUT_DIR, functools.partial(write_configs, cfg), data_sets)])
    return trainer.train()


def start(argv: list[str] | None = None) -> None:
    """Parses arguments, checks everything that can be checked, then launches the processes."""
    args = train_argument_parser().parse_args(argv)
    check_wandb(args.wandb)
    cfg = config_of(args)
    world = check_processes(args, cfg, cfg.MODEL)
    args.resume = may_continue(args, cfg.OUTPUT_DIR)
    check_run(cfg, args.resume, args.eval_only, world.local_size, world.size)
    launch_processes(main, args, str(cfg.MODEL.DEVICE))
