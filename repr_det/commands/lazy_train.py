"""The run of a LazyConfig, for the training command."""

import copy
import difflib
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from repr_det.commands.arguments import classes_of_data, output_folder
from repr_det.commands.config_files import config_path
from repr_det.commands.reads import Reads
from repr_det.commands.train import Run
from repr_det.datasets.findings import listed
from repr_det.detectron.config import as_user_error
from repr_det.detectron.lazy import (
    KEYS,
    NUM_CLASSES,
    LazyTrainer,
    check_evaluator,
    data_set_names,
    naming_lazy_keys,
    repr_cfg_from_lazy,
)
from repr_det.method.errors import UserError
from repr_det.runs.record import CONFIG_FILE

_NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def load_lazy_config(
    config_file: str,
    overrides: list[str],
    register: Sequence[Sequence[str]] = (),
    baseline: bool = False,
    eval_only: bool = False,
    resume: bool = False,
) -> DictConfig:
    """A LazyConfig with overrides ``path.key=value``; the rest as in ``arguments.build_config``.

    Raises:
        UserError: the file is missing, raises an error or lacks a node; an override is malformed; a data set is bad.
    """
    config_file = config_path(config_file)
    with as_user_error(config_file):
        cfg = LazyConfig.load(config_file)
    if missing := [node for node in _NODES if node not in cfg]:
        raise UserError(f"{config_file} lacks {missing[0]}: define {', '.join(_NODES)}")
    with as_user_error("overrides must be path.key=value"):
        _refuse_unknown_keys(cfg, overrides)
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    given = {override.partition("=")[0] for override in overrides}
    folder, key = OmegaConf.select(cfg, "train.output_dir", default="./output"), "train.output_dir"
    cfg.train.output_dir = folder = output_folder(str(folder), key, baseline and key not in given)
    if baseline and "repr" in cfg:
        cfg.repr.ENABLED = False
    data = [OmegaConf.select(cfg, f"dataloader.{x}.dataset.names", default=()) for x in ("train", "test")]
    weights = OmegaConf.select(cfg, "train.init_checkpoint", default="")
    classes = classes_of_data(register, *map(data_set_names, data), eval_only, resume, folder, weights)
    for key in NUM_CLASSES:
        if classes and key not in given and OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, classes)
    return cfg


def lazy_run(config_file: str, overrides: list[str], *rest: object) -> Run:
    """The run of a LazyConfig; the arguments are those of ``load_lazy_config``."""
    cfg = load_lazy_config(config_file, overrides, *rest)
    check_evaluator(cfg)
    write_config = functools.partial(_write_config, copy.deepcopy(cfg))
    reads = Reads(cfg)
    settings = repr_cfg_from_lazy(cfg)
    text = Path(config_path(config_file)).read_text(encoding="utf-8")
    naming = functools.partial(naming_lazy_keys, cfg)
    return Run(settings, LazyTrainer.of(cfg), text, write_config, reads.unread, naming)


def _write_config(cfg: DictConfig, folder: Path) -> None:
    LazyConfig.save(cfg, str(folder / CONFIG_FILE))


def _refuse_unknown_keys(cfg: DictConfig, overrides: list[str]) -> None:
    """A key that the config does not have is a typo, unless the override says that it is new (``+path.key=value``), or
    the ``_target_`` of its node, Detectron2 or this package takes it. Keys of ``repr`` are checked where it is read.
    """
    plain = OmegaConf.to_container(cfg)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if override.is_add() or key in KEYS or key.startswith("repr"):
            continue
        node, parts = plain, key.split(".")
        for depth, part in enumerate(parts):
            children = _children(node)
            if part in children:
                node = children[part]
                continue
            if _takes(node, part):
                break
            where = ".".join(parts[:depth])
            close = [".".join(filter(None, (where, k))) for k in difflib.get_close_matches(part, children, n=2)]
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {listed(children)}"
            raise UserError(
                f"override {key}: the config has no {part!r} in {where or 'it'}; {hint} (+{key}=... adds a new key)"
            )


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, (dict, list)):
        return {str(key): value for key, value in (node.items() if isinstance(node, dict) else enumerate(node))}
    return {}


def _takes(node: Any, name: str) -> bool:
    """Tells whether the callable of a LazyCall has an argument of this name."""
    target = node.get("_target_") if isinstance(node, dict) else None
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    except (TypeError, ValueError, ImportError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
