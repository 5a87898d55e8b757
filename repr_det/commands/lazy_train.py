"""The training command for LazyConfigs."""

import argparse
import copy
import functools
import logging
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf

from repr_det.commands.arguments import folder_of_checkpoint, output_folder, train_argument_parser
from repr_det.commands.checks import check_run
from repr_det.commands.data import classes_of_run, register_data
from repr_det.commands.overrides import refuse_unknown_keys
from repr_det.commands.processes import launch_processes, may_continue, setup_process
from repr_det.commands.reads import Reads
from repr_det.commands.shipped import config_path
from repr_det.commands.train import run_trainer
from repr_det.commands.world import check_processes
from repr_det.detectron.lazy import (
    NUM_CLASSES,
    LazyTrainer,
    check_evaluator,
    data_set_names,
    evaluate,
    naming_lazy_keys,
    repr_cfg_from_lazy,
)
from repr_det.detectron.trackers import check_wandb, tracked
from repr_det.method.errors import UserError
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.record import CONFIG_FILE

logger = logging.getLogger(__name__)


def load_lazy_config(
    config_file: str,
    overrides: list[str],
    register: list[list[str]] | None = None,
    baseline: bool = False,
    eval_only: bool = False,
    resume: bool = False,
) -> DictConfig:
    """A LazyConfig with overrides ``path.key=value``; the rest as in ``arguments.build_config``.

    Raises:
        UserError: the file is missing, raises an error or lacks a node; an override is malformed; a data set is bad.
    """
    config_file = config_path(config_file, ".py")
    try:
        cfg = LazyConfig.load(config_file)
    except Exception as error:  # a config is a program
        raise UserError(f"{config_file}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    try:
        refuse_unknown_keys(cfg, overrides)
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except UserError:
        raise
    except Exception as error:  # whatever hydra's parser and omegaconf raise
        raise UserError(f"overrides must be path.key=value: {' '.join(str(error).split())}") from error
    if (folder := OmegaConf.select(cfg, "train.output_dir", default=None)) is not None:
        cfg.train.output_dir = output_folder(folder, "train.output_dir")
    missing = [key for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train") if key not in cfg]
    if missing:
        raise UserError(
            f"{config_file} lacks {missing[0]}: define model, dataloader, optimizer, lr_multiplier and train"
        )
    if baseline:
        if "repr" in cfg:
            cfg.repr.ENABLED = False
        if not any(override.startswith("train.output_dir=") for override in overrides):
            cfg.train.output_dir = cfg.train.output_dir.rstrip("/") + "_baseline"
    train, test = (
        data_set_names(OmegaConf.select(cfg, f"dataloader.{which}.dataset.names", default=()))
        for which in ("train", "test")
    )
    register_data(register or [], train, test, eval_only)
    weights = OmegaConf.select(cfg, "train.init_checkpoint", default="")
    folder = folder_of_checkpoint(OmegaConf.select(cfg, "train.output_dir", default=""), weights, resume)
    classes = classes_of_run(train, test, eval_only, folder)
    for key in NUM_CLASSES if register and classes else ():
        given = any(override.startswith(f"{key}=") for override in overrides)
        if not given and OmegaConf.select(cfg, key, default=None) is not None:
            OmegaConf.update(cfg, key, len(classes))
    return cfg


def config_of(args: argparse.Namespace) -> DictConfig:
    return load_lazy_config(args.config_file, args.opts, args.register, args.baseline, args.eval_only, args.resume)


def main(args: argparse.Namespace) -> None:
    """One process of a run: trains, or only evaluates."""
    cfg = config_of(args)
    write_config = functools.partial(_write_config, copy.deepcopy(cfg))
    reads = Reads(cfg)
    yacs = repr_cfg_from_lazy(cfg)
    benchmark = bool(OmegaConf.select(cfg, "train.cudnn_benchmark", default=False))
    config = Path(args.config_file).read_text(encoding="utf-8")
    if precision := OmegaConf.select(cfg, "train.float32_precision", default=""):
        torch.set_float32_matmul_precision(precision)
    setup_process(args, yacs.MODEL.DEVICE, yacs.OUTPUT_DIR, yacs.SEED, benchmark, config)
    if args.eval_only:
        model = instantiate(cfg.model).to(cfg.train.device)
        AtomicCheckpointer(model, cfg.train.output_dir).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate(cfg, model)
        return
    trainer = tracked(LazyTrainer, args.wandb)(cfg)
    if unread := reads.unread():
        logger.warning("Nothing reads %s of this config: without effect here", ", ".join(unread))
    run_trainer(trainer, args, write_config)


def _write_config(cfg: DictConfig, folder: Path) -> None:
    LazyConfig.save(cfg, str(folder / CONFIG_FILE))


def start(argv: list[str] | None = None) -> None:
    """Parses arguments, checks what can be checked, then launches the processes."""
    args = train_argument_parser().parse_args(argv)
    check_wandb(args.wandb)
    start_with(args)


def start_with(args: argparse.Namespace) -> None:
    """Starts with parsed arguments, see ``start``."""
    cfg = config_of(args)
    yacs = repr_cfg_from_lazy(cfg)
    with naming_lazy_keys(cfg):
        world = check_processes(args, yacs, {"model": cfg.model})
        args.resume = may_continue(args, yacs.OUTPUT_DIR)
        check_run(yacs, args.resume, args.eval_only, world.local_size, world.size, lambda: instantiate(cfg.model))
    check_evaluator(cfg)
    launch_processes(main, args, yacs.MODEL.DEVICE)
