"""The LazyConfig route: what RePrHook needs from a LazyConfig with a node ``repr``, and a Trainer for such a config."""

import argparse
import os
from collections.abc import Iterable
from typing import Any

from repr_det.cli import as_user_error, check_run, launch_processes, setup_process, train_argument_parser  # isort: skip

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from repr_det.config import add_repr_config
from repr_det.datasets import class_names, register_builtin, register_coco_format
from repr_det.engine import Trainer
from repr_det.errors import UserError
from repr_det.resume import AtomicCheckpointer

_MULTI_STEP = "MultiStepParamScheduler"


def repr_cfg_from_lazy(cfg: DictConfig) -> CfgNode:
    """The config that RePrHook, ResumableLoader and ``cli.check_run`` take, from a LazyConfig.

    REPR comes from the node ``repr`` (the same keys, defaults where it lacks them, RePr off where there is no such
    node); device, weights, seed, output folder and periods from ``train``; batch size, workers and data sets from
    ``dataloader``; the learning-rate steps from the milestones of ``lr_multiplier`` if it is a MultiStepParamScheduler,
    with or without a warm-up around it. The rest keeps Detectron2's defaults and says nothing about the model.

    Raises:
        UserError: a key of ``repr`` is unknown or of the wrong type, or ``train.max_iter`` is missing.
    """
    yacs = get_cfg()
    add_repr_config(yacs)
    node = cfg.get("repr") or {}
    if not isinstance(node, (dict, DictConfig)):
        raise UserError(f"repr must be a dict with the keys of REPR, got {node!r}")
    with as_user_error("the node repr of the LazyConfig"):
        yacs.merge_from_other_cfg(CfgNode({"REPR": OmegaConf.to_container(OmegaConf.create(node), resolve=True)}))

    def get(key: str, default: Any) -> Any:
        return OmegaConf.select(cfg, key, default=default)

    max_iter = get("train.max_iter", None)
    if not isinstance(max_iter, int):
        raise UserError(f"train.max_iter must be an integer, got {max_iter!r}")
    yacs.SOLVER.MAX_ITER = max_iter
    yacs.SOLVER.STEPS, yacs.SOLVER.LR_SCHEDULER_NAME = _steps(cfg, max_iter)
    yacs.SOLVER.IMS_PER_BATCH = get("dataloader.train.total_batch_size", yacs.SOLVER.IMS_PER_BATCH)
    yacs.SOLVER.AMP.ENABLED = get("train.amp.enabled", False)
    yacs.SOLVER.CHECKPOINT_PERIOD = get("train.checkpointer.period", yacs.SOLVER.CHECKPOINT_PERIOD)
    yacs.SOLVER.REFERENCE_WORLD_SIZE = 0  # a LazyConfig is never rescaled
    yacs.TEST.EVAL_PERIOD = get("train.eval_period", 0)
    yacs.SEED = get("train.seed", -1)
    yacs.OUTPUT_DIR = get("train.output_dir", "./output")
    yacs.MODEL.DEVICE = str(get("train.device", "cuda"))
    yacs.MODEL.WEIGHTS = get("train.init_checkpoint", "")
    yacs.DATALOADER.NUM_WORKERS = get("dataloader.train.num_workers", 0)
    yacs.DATALOADER.ASPECT_RATIO_GROUPING = get("dataloader.train.aspect_ratio_grouping", True)
    yacs.DATASETS.TRAIN = _names(get("dataloader.train.dataset.names", ()))
    yacs.DATASETS.TEST = _names(get("dataloader.test.dataset.names", ()))
    for key, own in _NUM_CLASSES.items():
        if (number := get(key, None)) is not None:
            yacs.MODEL.META_ARCHITECTURE = "RetinaNet" if key == "model.num_classes" else "GeneralizedRCNN"
            yacs.merge_from_list([own, number])
    yacs.freeze()
    return yacs


_NUM_CLASSES = {
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
}


def load_lazy_config(
    config_file: str, overrides: list[str], register: list[list[str]] | None = None, baseline: bool = False
) -> DictConfig:
    """A LazyConfig with overrides ``path.key=value``; ``register`` and ``baseline`` as in ``cli.build_config``.

    Raises:
        UserError: the file is missing, raises an error or lacks a node; an override is malformed; a data set is bad.
    """
    if not os.path.isfile(config_file) or not config_file.endswith(".py"):
        raise UserError(
            f"--config-file {config_file!r} is not a .py file" if config_file else "--config-file is missing"
        )
    try:
        cfg = LazyConfig.load(config_file)
    except Exception as error:  # a config is a program
        raise UserError(f"{config_file}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    try:
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    except Exception as error:  # whatever hydra's parser and omegaconf raise
        raise UserError(f"overrides must be path.key=value: {' '.join(str(error).split())}") from error
    missing = [key for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train") if key not in cfg]
    if missing:
        raise UserError(
            f"{config_file} lacks {missing[0]}: define model, dataloader, optimizer, lr_multiplier and train"
        )
    register_builtin()
    for name, json_file, image_root in register or []:
        register_coco_format(name, json_file, image_root)
    trained = _names(OmegaConf.select(cfg, "dataloader.train.dataset.names", default=()))
    own = [name for name in trained if name in {name for name, *_ in register or []}]
    for key in _NUM_CLASSES if own else ():
        given = any(override.startswith(f"{key}=") for override in overrides)
        if not given and OmegaConf.select(cfg, key, default=None) is not None:
            OmegaConf.update(cfg, key, len(class_names(own[0])))
    if baseline:
        if "repr" in cfg:
            cfg.repr.ENABLED = False
        if not any(override.startswith("train.output_dir=") for override in overrides):
            cfg.train.output_dir = cfg.train.output_dir.rstrip("/") + "_baseline"
    return cfg


class LazyTrainer(Trainer):
    """Trainer for a LazyConfig: model, optimizer, data, learning rate and evaluation are what it says, the rest (RePr,
    atomic checkpoints, exact resume, guard) is Trainer's.

    Raises:
        UserError: ``repr`` is wrong for this model or schedule, or ``train.ddp`` asks for what Trainer does not do.
    """

    def __init__(self, lazy: DictConfig) -> None:
        self.lazy = lazy
        for key in ("find_unused_parameters", "fp16_compression"):
            if comm.get_world_size() > 1 and OmegaConf.select(lazy, f"train.ddp.{key}", default=False):
                raise UserError(f"train.ddp.{key} must be False here, got True")
        super().__init__(repr_cfg_from_lazy(lazy))

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return instantiate(self.lazy.model).to(cfg.MODEL.DEVICE)

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        self.lazy.optimizer.params.model = model
        return instantiate(self.lazy.optimizer)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, instantiate(self.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

    def build_train_loader(self, cfg: CfgNode) -> Iterable:
        return instantiate(self.lazy.dataloader.train)

    def build_hooks(self) -> list[HookBase]:
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = OmegaConf.select(self.lazy, "train.checkpointer.max_to_keep")
            elif isinstance(hook, hooks.PeriodicWriter):
                hook._period = OmegaConf.select(self.lazy, "train.log_period", default=hook._period)
        return built

    def test(self, cfg: CfgNode, model: nn.Module) -> dict | None:
        return evaluate(self.lazy, model)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict | None:
    """What ``dataloader.evaluator`` finds on ``dataloader.test``; None where there is no evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    if "output_dir" not in cfg.dataloader.evaluator and "dataset_name" in cfg.dataloader.evaluator:
        cfg.dataloader.evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference")
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def main(args: argparse.Namespace) -> None:
    """One process of a run: trains, or only evaluates."""
    cfg = load_lazy_config(args.config_file, args.opts, args.register, args.baseline)
    setup_process(args, cfg, str(cfg.train.device), cfg.train.output_dir)
    if args.eval_only:
        model = instantiate(cfg.model).to(cfg.train.device)
        AtomicCheckpointer(model, cfg.train.output_dir).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate(cfg, model)
        return
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def start(argv: list[str] | None = None) -> None:
    """Parses arguments, checks what can be checked, then launches the processes."""
    args = train_argument_parser().parse_args(argv)
    yacs = repr_cfg_from_lazy(load_lazy_config(args.config_file, args.opts, args.register, args.baseline))
    check_run(yacs, args.resume, args.eval_only, args.num_gpus)
    launch_processes(main, args, yacs.MODEL.DEVICE)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (list, tuple, ListConfig)) else (value,)


def _steps(cfg: DictConfig, max_iter: int) -> tuple[tuple[int, ...], str]:
    """SOLVER.STEPS and LR_SCHEDULER_NAME of ``lr_multiplier``; milestones count in units of its own total."""
    multiplier = cfg.get("lr_multiplier")
    scheduler = multiplier.get("scheduler", multiplier) if multiplier is not None else {}
    target = scheduler.get("_target_", "")
    name = target if isinstance(target, str) else target.__name__
    if name.rpartition(".")[2] != _MULTI_STEP:
        return (), "WarmupCosineLR"
    milestones = list(scheduler.milestones)
    total = scheduler.get("num_updates") or milestones[-1]
    steps = [round(milestone * max_iter / total) for milestone in milestones]
    return tuple(step for step in steps if step < max_iter), "WarmupMultiStepLR"
