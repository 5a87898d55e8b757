"""The training command, by a yaml config or a LazyConfig (in Python)."""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from repr_det.commands.arguments import build_config, train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.commands.processes import check_processes, launch_processes, may_continue, setup_process, write_configs
from repr_det.detectron.config import changed, quiet
from repr_det.detectron.engine import Trainer
from repr_det.detectron.passes import epochs_of, map_dataset
from repr_det.detectron.trackers import wandb_module
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.guard import FiniteGuard
from repr_det.runs.record import RunRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run of a config file."""

    cfg: CfgNode
    trainer: type[Trainer]
    text: str  # for the log
    write_config: Callable[[Path], None]
    unread: Callable[[], list[str]] = list  # lists keys that nothing has read
    naming: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # spells keys in errors


def run_of(args: argparse.Namespace) -> Run:
    given = (args.config_file, args.opts, args.register, args.baseline, args.eval_only, args.resume)
    if args.config_file.endswith(".py"):
        from repr_det.commands.lazy import lazy_run

        return lazy_run(*given)
    cfg = build_config(*given)
    return Run(cfg, Trainer, cfg.dump(), functools.partial(write_configs, cfg))


def start(argv: list[str] | None = None) -> None:
    """Parses arguments, checks the run, then launches the processes."""
    args = train_argument_parser().parse_args(argv)
    if args.wandb:
        wandb_module()
    run = run_of(args)
    cfg = run.cfg
    with run.naming():
        check_run(cfg, may_continue(args), args.eval_only, *check_processes(args), run.trainer)
    launch_processes(main, args, cfg.MODEL.DEVICE)


def main(args: argparse.Namespace) -> dict | None:
    """One process of a run: trains and evaluates, or only evaluates."""
    with quiet():  # start has warned
        run = run_of(args)  # data sets are per process
    cfg = run.cfg
    setup_process(args, cfg, run.text)
    if not args.eval_only:
        with run.naming():
            return _train(run, args)
    model = run.trainer.build_model(cfg)
    AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    cfg = changed(cfg, "OUTPUT_DIR", os.path.join(cfg.OUTPUT_DIR, "eval_only"))  # what training found stays
    results = run.trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(run.trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(run: Run, args: argparse.Namespace) -> dict | None:
    cfg, trainer = run.cfg, run.trainer(run.cfg, wandb_project=args.wandb)
    if unread := run.unread():
        logger.warning("Nothing reads %s of this config", ", ".join(unread))
    for hook in trainer._hooks:
        if isinstance(hook, FiniteGuard) and args.check_gradients:
            hook.check_gradients = not cfg.SOLVER.AMP.ENABLED
    trainer.resume_or_load(resume=args.resume)
    trainer.register_hooks([RunRecord(run.write_config)])
    logger.info(describe_run(trainer))
    return trainer.train()


def describe_run(trainer: Trainer) -> str:
    """The images and epochs of a run, and whether RePr is on."""
    cfg = trainer.cfg
    line = f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"
    epochs = epochs_of(trainer, None)
    if epochs is not None:
        images = len(map_dataset(trainer._trainer.data_loader))
        line = f"{images} training images, {line}: {epochs:.3g} epochs"
    if cfg.REPR.ENABLED:
        return f"{line}; RePr is on ({cfg.REPR.CRITERION}; REPR.ENABLED False switches it off)"
    return f"{line}; RePr is off (REPR.ENABLED True, or a config repr_*.yaml, switches it on)"
