"""Runs of a LazyConfig: its yacs config, and its Trainer."""

import contextlib
import copy
import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from repr_det.commands.arguments import config_path, naming_close_keys, output_folder, weights_to_evaluate
from repr_det.commands.checks import try_mapper
from repr_det.commands.data import prepare_data
from repr_det.commands.train import Run
from repr_det.datasets import CocoEvaluator
from repr_det.datasets.findings import listed
from repr_det.detectron.config import add_repr_config, as_user_error, decays, defined_at_its_end
from repr_det.detectron.engine import Trainer
from repr_det.method.errors import UserError
from repr_det.method.options import CONFIG_KEYS
from repr_det.runs.record import CONFIG_FILE

# Keys of a LazyConfig that are read, and their yaml keys.
KEYS = {
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
    "dataloader.train.dataset.names": "DATASETS.TRAIN",
    "dataloader.test.dataset.names": "DATASETS.TEST",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
    "dataloader.train.mapper.use_instance_mask": "MODEL.MASK_ON",
    "dataloader.train.mapper.use_keypoint": "MODEL.KEYPOINT_ON",
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
    "model.roi_heads.keypoint_head.num_keypoints": "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.checkpointer.max_to_keep": "SOLVER.MAX_TO_KEEP",
    "train.log_period": "SOLVER.LOG_PERIOD",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.seed": "SEED",
    "train.output_dir": "OUTPUT_DIR",
    "train.device": "MODEL.DEVICE",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "train.float32_precision": "FLOAT32_PRECISION",
}
_NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_CALLED = ("model", "dataloader", "optimizer", "lr_multiplier", "repr")  # their callables refuse what they do not take


def lazy_run(config_file: str, overrides: list[str], *rest: object) -> Run:
    """The run of a LazyConfig; arguments as in ``load_lazy_config``."""
    cfg = load_lazy_config(config_file, overrides, *rest)
    as_given = copy.deepcopy(cfg)

    def write_config(folder: Path) -> None:
        LazyConfig.save(as_given, str(folder / CONFIG_FILE))

    loaded = _data_sets(cfg, "test")
    for name in [evaluator.get("dataset_name") for evaluator in _evaluators(cfg)]:
        if name is not None and loaded != (name,):
            what = f"one data set, the dataset_name of dataloader.evaluator ({name}), got {listed(loaded)}"
            raise UserError(f"dataloader.test.dataset.names must be {what}")
    unread = record_reads(cfg)
    settings = repr_cfg_from_lazy(cfg)
    text = Path(config_path(config_file)).read_text(encoding="utf-8")
    return Run(settings, LazyTrainer.of(cfg), text, write_config, unread, functools.partial(naming_lazy_keys, cfg))


def load_lazy_config(
    config_file: str,
    overrides: list[str],
    register: Sequence[Sequence[str]] = (),
    baseline: bool = False,
    eval_only: bool = False,
    resume: bool = False,
) -> DictConfig:
    """A LazyConfig with overrides ``path.key=value``; other arguments and errors as in ``build_config``."""
    config_file = config_path(config_file)
    with as_user_error(config_file):
        cfg = LazyConfig.load(config_file)
    if missing := [node for node in _NODES if node not in cfg]:
        raise UserError(f"{config_file} lacks {missing[0]}: define {', '.join(_NODES)}")
    with as_user_error("overrides must be path.key=value"):
        _refuse_unknown_keys(cfg, overrides)
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    folder, key = cfg.train.get("output_dir", "./output"), "train.output_dir"
    cfg.train.output_dir = folder = output_folder(str(folder), key, baseline and key not in given)
    if baseline and "repr" in cfg:
        cfg.repr.ENABLED = False
    weights = folder, cfg.train.get("init_checkpoint", ""), resume, "train.init_checkpoint" in given
    evaluated = weights_to_evaluate(*weights) if eval_only else None
    classes = prepare_data(register, _data_sets(cfg, "train"), _data_sets(cfg, "test"), evaluated)
    for key, own in KEYS.items():
        if classes and own.endswith("NUM_CLASSES") and key not in given and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, classes)
    for which in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{which}.mapper"
        if mapper := OmegaConf.select(cfg, key):
            try_mapper(key, functools.partial(instantiate, mapper))
    return cfg


def _data_sets(cfg: DictConfig, which: str) -> tuple[str, ...]:
    names = OmegaConf.select(cfg, f"dataloader.{which}.dataset.names") or ()
    return tuple(names) if isinstance(names, (list, tuple, ListConfig)) else (names,)


def _evaluators(cfg: DictConfig) -> list[DictConfig]:
    given = OmegaConf.select(cfg, "dataloader.evaluator")
    return [x.copy() for x in ([given] if isinstance(given, DictConfig) else given or ())]


def _refuse_unknown_keys(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuses keys that the config lacks. Allowed are those marked as new (``+path.key=value``), those of this package,
    and arguments of a node's ``_target_``."""
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if override.is_add() or key in KEYS or key.startswith("repr"):
            continue
        where, _, name = key.rpartition(".")
        while OmegaConf.select(cfg, where) is None:
            where, _, name = where.rpartition(".")
        node = OmegaConf.select(cfg, where)  # "" selects the config itself
        children = list(node) if isinstance(node, DictConfig) else []
        if isinstance(node, ListConfig):
            children = [str(number) for number in range(len(node))]
        if name in children or _takes(node, name):
            continue
        close = [f"{where}.{child}".lstrip(".") for child in difflib.get_close_matches(name, children, n=2)]
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {listed(children)}"
        raise UserError(
            f"override {key}: the config has no {name!r} in {where or 'it'}; {hint} (+{key}=... adds a new key)"
        )


def _takes(node: Any, name: str) -> bool:
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    except (TypeError, ValueError, ImportError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def record_reads(cfg: DictConfig) -> Callable[[], list[str]]:
    """Notes which keys of nodes that are not called, such as ``train``, are read. Returns what lists the others."""
    values, used = {}, set()

    def read(key: str) -> Any:
        used.add(key)
        return values[key]

    OmegaConf.register_new_resolver("repr_det.read", read, replace=True)
    for name in cfg:
        if name not in _CALLED and isinstance(cfg[name], DictConfig):
            for key in list(cfg[name]):
                values[f"{name}.{key}"] = cfg[name][key]
                cfg[name][key] = f"${{repr_det.read:{name}.{key}}}"
    return lambda: sorted(values.keys() - used)


def repr_cfg_from_lazy(cfg: DictConfig) -> CfgNode:
    """The yacs config for checks and RePrHook. REPR comes from the node ``repr``: L(RePrHook)(...), or keys as in yaml.
    SOLVER.STEPS are the decays of ``lr_multiplier``. The rest comes from ``KEYS``, or has Detectron2's defaults.
    UserError if a key is unknown or of the wrong type, or ``train.max_iter`` is missing."""
    yacs = get_cfg()
    add_repr_config(yacs)
    yacs.FLOAT32_PRECISION = ""
    yacs.SOLVER.LOG_PERIOD, yacs.SOLVER.MAX_TO_KEEP = 20, 10**9
    yacs.SOLVER.WARMUP_ITERS = yacs.DATALOADER.NUM_WORKERS = 0
    with naming_close_keys(yacs), as_user_error("the node repr of the LazyConfig"):
        _merge_repr(yacs, cfg.get("repr") or {})
    found = {own: OmegaConf.select(cfg, key) for key, own in KEYS.items()}
    found |= {"DATASETS.TRAIN": _data_sets(cfg, "train"), "DATASETS.TEST": _data_sets(cfg, "test")}
    found["TEST.KEYPOINT_OKS_SIGMAS"] = [s for one in _evaluators(cfg) for s in one.get("kpt_oks_sigmas") or ()]
    if found["SOLVER.MAX_ITER"] is None:
        raise UserError("train.max_iter is missing: give the number of iterations")
    with naming_lazy_keys(cfg), as_user_error("LazyConfig"):
        for key, value in found.items():
            if value is not None:
                yacs.merge_from_list([key, value])
    if found["MODEL.RETINANET.NUM_CLASSES"] is not None:
        yacs.MODEL.META_ARCHITECTURE = "RetinaNet"
    elif found["MODEL.ROI_HEADS.NUM_CLASSES"] is None:
        yacs.MODEL.META_ARCHITECTURE = ""  # nothing tells the number of its classes
    yacs.SOLVER.STEPS = ()
    if "lr_multiplier" in cfg:  # other trainers may call it otherwise
        with as_user_error("lr_multiplier"):
            yacs.SOLVER.STEPS = decays(instantiate(cfg.lr_multiplier), yacs.SOLVER.MAX_ITER)
    yacs.freeze()
    return yacs


def _merge_repr(yacs: CfgNode, node: Any) -> None:
    given = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    if given.pop("_target_", None) is not None:
        yacs.REPR.ENABLED = True
        for name in [name for name in given if name in CONFIG_KEYS]:
            yacs.merge_from_list([CONFIG_KEYS[name], given.pop(name)])
    yacs.merge_from_other_cfg(CfgNode({"REPR": given}))


@contextlib.contextmanager
def naming_lazy_keys(cfg: DictConfig) -> Iterator[None]:
    """Replaces yaml keys in a UserError by those of the LazyConfig."""
    by_arguments = "_target_" in (cfg.get("repr") or {})
    names = {"TEST.KEYPOINT_OKS_SIGMAS": "dataloader.evaluator.kpt_oks_sigmas"}
    names |= {own: key for key, own in KEYS.items()}
    for option, own in CONFIG_KEYS.items():
        names[own] = f"repr.{option}" if by_arguments else own.replace("REPR", "repr")
    try:
        yield
    except UserError as error:
        spelled = re.sub(r"(?<![\w./])[A-Z][\w.]*\w", lambda found: names.get(found[0], found[0]), str(error))
        error.args = (spelled,)
        raise


class LazyTrainer(Trainer):
    """Trainer of a LazyConfig: ``LazyTrainer.of(lazy)(repr_cfg_from_lazy(lazy))``; UserError if ``repr`` is wrong for
    it, or ``train.ddp`` asks for what Trainer does not do."""

    lazy: DictConfig

    @classmethod
    def of(cls, lazy: DictConfig) -> type["LazyTrainer"]:
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
        with as_user_error("optimizer"):
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
                hook.max_to_keep = self.cfg.SOLVER.MAX_TO_KEEP
            elif isinstance(hook, hooks.PeriodicWriter):
                hook._period = self.cfg.SOLVER.LOG_PERIOD
        return built

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict:
        """Evaluates by ``dataloader.evaluator`` on ``dataloader.test``; {} without evaluator."""
        made = []
        for evaluator in _evaluators(cls.lazy):
            if "output_dir" not in evaluator and _takes(evaluator, "output_dir"):
                evaluator.output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
            target = evaluator.get("_target_")
            if (locate(target) if isinstance(target, str) else target) is COCOEvaluator:
                evaluator._target_ = CocoEvaluator
            made.append(instantiate(evaluator))
        if not made:
            return {}
        results = inference_on_dataset(model, instantiate(cls.lazy.dataloader.test), made)
        print_csv_format(results)
        return results
