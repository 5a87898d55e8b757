"""The LazyConfig route: the yacs config that a LazyConfig stands for, and a Trainer that builds what it describes."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from repr_det.datasets import CocoEvaluator
from repr_det.detectron.config import add_repr_config, as_user_error, decays, defined_at_its_end
from repr_det.detectron.engine import Trainer
from repr_det.method.errors import UserError
from repr_det.method.options import CONFIG_KEYS

NUM_CLASSES = {
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
}
_DATA_SETS = {"dataloader.train.dataset.names": "DATASETS.TRAIN", "dataloader.test.dataset.names": "DATASETS.TEST"}
# Keys of a LazyConfig that are read, and those of a yaml config that mean the same.
KEYS = {
    **NUM_CLASSES,
    **_DATA_SETS,
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.checkpointer.max_to_keep": "",
    "train.log_period": "",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.seed": "SEED",
    "train.output_dir": "OUTPUT_DIR",
    "train.device": "MODEL.DEVICE",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "train.float32_precision": "FLOAT32_PRECISION",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
    "dataloader.train.mapper.use_instance_mask": "MODEL.MASK_ON",
    "dataloader.train.mapper.use_keypoint": "MODEL.KEYPOINT_ON",
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
    "dataloader.evaluator.output_dir": "",
}


def repr_cfg_from_lazy(cfg: DictConfig) -> CfgNode:
    """The config that RePrHook, ResumableLoader and ``checks.check_run`` take, from a LazyConfig.

    REPR comes from the node ``repr`` (L(RePrHook)(...), or the same keys as in yaml; RePr off if there is no such
    node), the learning-rate steps from where ``lr_multiplier``, whatever it is, decays, the rest by ``KEYS``. What
    these do not name keeps Detectron2's defaults and says nothing about the model.

    Raises:
        UserError: a key is unknown or of the wrong type, or ``train.max_iter`` is missing.
    """
    yacs = get_cfg()
    add_repr_config(yacs)
    yacs.FLOAT32_PRECISION = ""
    yacs.SOLVER.WARMUP_ITERS = yacs.DATALOADER.NUM_WORKERS = 0
    yacs.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    with as_user_error("the node repr of the LazyConfig"):
        _merge_repr(yacs, cfg.get("repr") or {})
    found = {own: OmegaConf.select(cfg, key, default=None) for key, own in KEYS.items() if own}
    if found["SOLVER.MAX_ITER"] is None:
        raise UserError("train.max_iter is missing: give the number of iterations")
    with naming_lazy_keys(cfg), as_user_error("LazyConfig"):
        for key, value in found.items():
            if key in _DATA_SETS.values():
                value = data_set_names(() if value is None else value)
            if value is not None:
                yacs.merge_from_list([key, value])
    if found["MODEL.RETINANET.NUM_CLASSES"] is not None:
        yacs.MODEL.META_ARCHITECTURE = "RetinaNet"
    yacs.SOLVER.STEPS = ()
    if "lr_multiplier" in cfg:  # a trainer of somebody's own may call it otherwise
        with as_user_error("lr_multiplier"):
            yacs.SOLVER.STEPS = decays(instantiate(cfg.lr_multiplier), yacs.SOLVER.MAX_ITER)
    yacs.freeze()
    return yacs


def _merge_repr(yacs: CfgNode, node: Any) -> None:
    """Sets the keys of REPR that the node ``repr`` sets: by name, or as arguments of L(RePrHook)."""
    if not isinstance(node, (dict, DictConfig)):
        raise UserError(f"repr must be L(RePrHook)(...) or a dict with the keys of REPR, got {node!r}")
    given = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    if given.pop("_target_", None) is None:
        yacs.merge_from_other_cfg(CfgNode({"REPR": given}))
        return
    yacs.REPR.ENABLED = given.pop("ENABLED", True)
    for name, value in given.items():
        if name not in CONFIG_KEYS:
            raise UserError(
                f"the node repr has no option {name!r}: take one of {', '.join(CONFIG_KEYS)}; the rest comes from "
                "train and dataloader"
            )
        yacs.merge_from_list([CONFIG_KEYS[name], value])


@contextlib.contextmanager
def naming_lazy_keys(cfg: DictConfig) -> Iterator[None]:
    """A UserError names the keys of a LazyConfig, not those of a yaml config that ``repr_cfg_from_lazy`` stands for."""
    by_arguments = "_target_" in (cfg.get("repr") or {})
    names = {own: key for key, own in KEYS.items()}
    for option, own in CONFIG_KEYS.items():
        names[own] = f"repr.{option}" if by_arguments else own.replace("REPR", "repr")
    try:
        yield
    except UserError as error:
        spelled = re.sub(r"(?<![\w./])[A-Z][\w.]*\w", lambda found: names.get(found[0], found[0]), str(error))
        error.args = (spelled,)
        raise


def check_evaluator(cfg: DictConfig) -> None:
    """Raises UserError where ``dataloader.evaluator`` is of a data set that is not loaded."""
    name = OmegaConf.select(cfg, "dataloader.evaluator.dataset_name", default=None)
    loaded = data_set_names(OmegaConf.select(cfg, "dataloader.test.dataset.names", default=()))
    if name is not None and name not in loaded:
        raise UserError(
            f"dataloader.evaluator.dataset_name must be that of dataloader.test ({', '.join(loaded)}), got {name!r}"
        )


class LazyTrainer(Trainer):
    """Trainer for a LazyConfig: model, optimizer, data, learning rate and evaluation are what it says, the rest (RePr,
    atomic checkpoints, exact resume, guard) is Trainer's. ``LazyTrainer.of(lazy)(repr_cfg_from_lazy(lazy))`` makes one.

    Raises:
        UserError: ``repr`` is wrong for this model or schedule, or ``train.ddp`` asks for what Trainer does not do.
    """

    lazy: DictConfig

    @classmethod
    def of(cls, lazy: DictConfig) -> type["LazyTrainer"]:
        """The trainer of one LazyConfig."""
        return type(cls.__name__, (cls,), {"lazy": lazy})

    def __init__(self, cfg: CfgNode, wandb_project: str = "") -> None:
        for key in ("find_unused_parameters", "fp16_compression", "broadcast_buffers"):
            if OmegaConf.select(self.lazy, f"train.ddp.{key}", default=False) and comm.get_world_size() > 1:
                raise UserError(f"train.ddp.{key} must be False here, got True")
        super().__init__(cfg, wandb_project)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return instantiate(cls.lazy.model).to(cfg.MODEL.DEVICE)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        cls.lazy.optimizer.params.model = model
        return instantiate(cls.lazy.optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return defined_at_its_end(LRMultiplier(optimizer, instantiate(cls.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        return instantiate(cls.lazy.dataloader.train)

    def build_hooks(self) -> list[HookBase]:
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = OmegaConf.select(self.lazy, "train.checkpointer.max_to_keep")
            elif isinstance(hook, hooks.PeriodicWriter):
                hook._period = OmegaConf.select(self.lazy, "train.log_period", default=hook._period)
        return built

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        """Evaluates by ``dataloader.evaluator`` on ``dataloader.test``; {} if there is no evaluator."""
        data = cls.lazy.dataloader
        if "evaluator" not in data:
            return {}
        evaluator = data.evaluator.copy()
        if "output_dir" not in evaluator and "dataset_name" in evaluator:
            evaluator.output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        target = evaluator.get("_target_")
        if (locate(target) if isinstance(target, str) else target) is COCOEvaluator:
            evaluator._target_ = CocoEvaluator
        results = inference_on_dataset(model, instantiate(data.test), instantiate(evaluator))
        print_csv_format(results)
        return results


def data_set_names(value: Any) -> tuple[str, ...]:
    """``dataset.names`` of a LazyConfig, one name or several, as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple, ListConfig)) else (value,)
