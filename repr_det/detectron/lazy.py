"""The LazyConfig route: what RePrHook needs from a LazyConfig with a node ``repr``, and a Trainer for such a config."""

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
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from repr_det.datasets import CocoEvaluator
from repr_det.detectron.config import add_repr_config, as_user_error
from repr_det.detectron.decay import DefinedAtItsEnd, decays
from repr_det.detectron.engine import Trainer
from repr_det.method.errors import UserError
from repr_det.method.options import CONFIG_KEYS, about_option, option_names

_COCO = f"{COCOEvaluator.__module__}.{COCOEvaluator.__name__}"


def repr_cfg_from_lazy(cfg: DictConfig) -> CfgNode:
    """The config that RePrHook, ResumableLoader and ``checks.check_run`` take, from a LazyConfig.

    REPR comes from the node ``repr`` (L(RePrHook)(...), or the same keys as in yaml; RePr off if there is no such
    node); device, weights, seed, output folder and periods from ``train``; batch size, workers and data sets from
    ``dataloader``; the learning-rate steps from where ``lr_multiplier``, whatever it is, decays. The rest keeps
    Detectron2's defaults and says nothing about the model.

    Raises:
        UserError: a key of ``repr`` is unknown or of the wrong type, or ``train.max_iter`` is missing.
    """
    yacs = get_cfg()
    add_repr_config(yacs)
    with as_user_error("the node repr of the LazyConfig"):
        yacs.merge_from_other_cfg(CfgNode({"REPR": _repr_node(cfg)}))

    def get(key: str, default: Any) -> Any:
        return OmegaConf.select(cfg, key, default=default)

    max_iter = get("train.max_iter", None)
    if not isinstance(max_iter, int):
        raise UserError(f"train.max_iter must be an integer, got {max_iter!r}")
    yacs.SOLVER.MAX_ITER = max_iter
    yacs.SOLVER.STEPS, yacs.SOLVER.LR_SCHEDULER_NAME = _steps(cfg, max_iter), "WarmupMultiStepLR"
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
    yacs.DATASETS.TRAIN = data_set_names(get("dataloader.train.dataset.names", ()))
    yacs.DATASETS.TEST = data_set_names(get("dataloader.test.dataset.names", ()))
    yacs.MODEL.MASK_ON = bool(get("dataloader.train.mapper.use_instance_mask", False))
    yacs.MODEL.KEYPOINT_ON = bool(get("dataloader.train.mapper.use_keypoint", False))
    yacs.INPUT.MASK_FORMAT = get("dataloader.train.mapper.instance_mask_format", "polygon")
    for key, own in NUM_CLASSES.items():
        if (number := get(key, None)) is not None:
            yacs.MODEL.META_ARCHITECTURE = "RetinaNet" if key == "model.num_classes" else "GeneralizedRCNN"
            yacs.merge_from_list([own, number])
    yacs.freeze()
    return yacs


NUM_CLASSES = {
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
}
_KEYS = NUM_CLASSES | {
    "train.max_iter": "SOLVER.MAX_ITER",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.output_dir": "OUTPUT_DIR",
    "train.device": "MODEL.DEVICE",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "dataloader.train.dataset.names": "DATASETS.TRAIN",
    "dataloader.test.dataset.names": "DATASETS.TEST",
    "dataloader.train.mapper.use_instance_mask": "MODEL.MASK_ON",
    "dataloader.train.mapper.use_keypoint": "MODEL.KEYPOINT_ON",
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
}


@contextlib.contextmanager
def naming_lazy_keys(cfg: DictConfig) -> Iterator[None]:
    """A UserError names the keys of a LazyConfig, not those of a yaml config that ``repr_cfg_from_lazy`` stands for."""
    by_arguments = "_target_" in (cfg.get("repr") or {})
    options = {f"repr.{name if by_arguments else about_option(name).key}": name for name in option_names()}
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, own in (_KEYS | {key: CONFIG_KEYS[name] for key, name in options.items()}).items():
            text = re.sub(rf"(?<![\w.]){re.escape(own)}(?![\w.]*\w)", key, text)
        raise UserError(text) from error


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
    atomic checkpoints, exact resume, guard) is Trainer's.

    Raises:
        UserError: ``repr`` is wrong for this model or schedule, or ``train.ddp`` asks for what Trainer does not do.
    """

    def __init__(self, lazy: DictConfig) -> None:
        self.lazy = lazy
        for key in ("find_unused_parameters", "fp16_compression", "broadcast_buffers"):
            if OmegaConf.select(lazy, f"train.ddp.{key}", default=False) and comm.get_world_size() > 1:
                raise UserError(f"train.ddp.{key} must be False here, got True")
        super().__init__(repr_cfg_from_lazy(lazy))

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return instantiate(self.lazy.model).to(cfg.MODEL.DEVICE)

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        self.lazy.optimizer.params.model = model
        return instantiate(self.lazy.optimizer)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, DefinedAtItsEnd(instantiate(self.lazy.lr_multiplier)), cfg.SOLVER.MAX_ITER)

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
    """Evaluates by ``dataloader.evaluator`` on ``dataloader.test``; None if there is no evaluator."""
    if "evaluator" not in cfg.dataloader:
        return None
    if "output_dir" not in cfg.dataloader.evaluator and "dataset_name" in cfg.dataloader.evaluator:
        cfg.dataloader.evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference")
    evaluator = cfg.dataloader.evaluator
    if evaluator.get("_target_") in (COCOEvaluator, "detectron2.evaluation.COCOEvaluator", _COCO):
        evaluator = OmegaConf.merge(evaluator, {"_target_": CocoEvaluator})
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
    print_csv_format(results)
    return results


def data_set_names(value: Any) -> tuple[str, ...]:
    """``dataset.names`` of a LazyConfig, one name or several, as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple, ListConfig)) else (value,)


def _repr_node(cfg: DictConfig) -> dict[str, Any]:
    """The keys of REPR that the node ``repr`` sets: by name, or as arguments of L(RePrHook)."""
    node = cfg.get("repr") or {}
    if not isinstance(node, (dict, DictConfig)):
        raise UserError(f"repr must be L(RePrHook)(...) or a dict with the keys of REPR, got {node!r}")
    given = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    target = given.pop("_target_", None)
    if target is None:
        return given
    enabled = given.pop("ENABLED", True)
    keys = {name: about_option(name).key for name in option_names()}
    if unknown := sorted(set(given) - set(keys)):
        raise UserError(
            f"the node repr has no option {unknown[0]!r}: take one of {', '.join(keys)}; the rest comes from train and "
            "dataloader"
        )
    found: dict[str, Any] = {"ENABLED": enabled}
    for name, value in given.items():
        *nodes, last = keys[name].split(".")
        place = found
        for part in nodes:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def _steps(cfg: DictConfig, max_iter: int) -> tuple[int, ...]:
    """Returns SOLVER.STEPS: the iterations at which ``lr_multiplier``, if any, decays (``decay.decays``)."""
    if "lr_multiplier" not in cfg:
        return ()  # a trainer of somebody's own that does not follow Detectron2's names
    with as_user_error("lr_multiplier"):
        return decays(instantiate(cfg.lr_multiplier), max_iter)
