"""Every check of a run that can be made before a file is written; the model is built for it without its numbers."""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
from torch import nn

from repr_det.commands.config_files import merge_config_file
from repr_det.commands.data import check_same_classes
from repr_det.commands.data_checks import check_datasets, local_file
from repr_det.commands.key_checks import (
    check_device,
    check_evaluation,
    check_input,
    check_optimizer,
    check_solver,
    scaled_config,
)
from repr_det.datasets import class_names
from repr_det.detectron.config import (
    add_repr_config,
    as_user_error,
    naming_keys,
    options_of_config,
    schedule_from_config,
    validate_repr_config,
)
from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.method.selection import check_capacity
from repr_det.runs.checkpoints import AtomicCheckpointer, check_last_checkpoint, fit_names, zero_filters
from repr_det.runs.files import run_traces

logger = logging.getLogger(__name__)


def check_run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    num_gpus: int = 1,
    world_size: int | None = None,
    build: Callable[[], nn.Module] | None = None,
) -> None:
    """Everything that can be known to be wrong before a file is written.

    Args:
        num_gpus: processes on this machine.
        world_size: all of them, by default ``num_gpus``.
        build: makes the model, where ``cfg`` does not say it (LazyConfig); called under ``torch.device("meta")`` first.

    Raises:
        UserError: naming the key, file or folder.
    """
    check_device(cfg, num_gpus)
    check_evaluation(cfg)
    scaled = scaled_config(cfg, world_size or num_gpus)
    if not eval_only:
        check_solver(scaled, num_gpus)
        validate_repr_config(scaled)
        if build is None:  # a LazyConfig makes its own from these
            check_input(scaled)
            check_optimizer(scaled)
        check_output_folder(cfg, resume)
    check_datasets(cfg, eval_only)
    if not eval_only and resume:
        check_same_classes(class_names(cfg.DATASETS.TRAIN[0]), cfg.OUTPUT_DIR)
    model = _model_of_shapes(cfg, build)
    _check_augmentation(cfg, model)
    if cfg.REPR.ENABLED and not eval_only:
        check_layers(cfg, model)
    _check_weights(cfg, model, resume, eval_only)


def _check_augmentation(cfg: CfgNode, model: nn.Module) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    unfit = [
        name
        for name, is_so in (
            (type(model).__name__, not isinstance(model, GeneralizedRCNN)),
            ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
            ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
        )
        if is_so
    ]
    if unfit:
        raise UserError(
            "TEST.AUG.ENABLED is True, but Detectron2 has test-time augmentation for GeneralizedRCNN, not "
            f"{unfit[0]}: set it to False"
        )


def check_layers(cfg: CfgNode, model: nn.Module) -> None:
    """REPR.LAYERS matches trainable convs, and the caps leave room for REPR.DROP_RATIO."""
    options = options_of_config(cfg)
    with naming_keys():
        layers = find_filter_layers(model, options.layers, options.exclude)
        sizes = {layer.name: layer.num_filters for layer in layers}
        check_capacity(sizes, options.drop_ratio, options.max_drop_per_layer)


def check_output_folder(cfg: CfgNode, resume: bool) -> None:
    """A new run gets a folder without another run's files; a resumed one the folder of the same run."""
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty: give the folder that the run is to write to")
    folder = Path(cfg.OUTPUT_DIR)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"OUTPUT_DIR {folder} is a link to {os.readlink(folder)}, which is not there")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUTPUT_DIR {folder} is a file, not a folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"OUTPUT_DIR {folder} cannot be made: {parent} is a file")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:  # read-only, full, a file system without room for files
        raise UserError(f"OUTPUT_DIR {folder} cannot be written ({error.strerror}): give another folder") from error
    traces = run_traces(folder)
    saved = folder / "config.yaml"
    if resume and saved.exists():
        _check_same_run(cfg, saved)
    if not traces:
        return
    if not resume:
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(traces[:3])}): add --resume to continue it, or "
            "give another OUTPUT_DIR"
        )
    check_last_checkpoint(str(folder))


def _check_same_run(cfg: CfgNode, saved: Path) -> None:
    old = get_cfg()
    add_repr_config(old)
    try:
        merge_config_file(old, str(saved))
    except UserError:
        return  # cut short by a crash; the checkpoint itself knows its schedule
    if old.REPR.ENABLED != cfg.REPR.ENABLED:
        raise UserError(
            f"OUTPUT_DIR {saved.parent} holds a run with REPR.ENABLED {old.REPR.ENABLED}, this one has "
            f"{cfg.REPR.ENABLED}: give another OUTPUT_DIR"
        )
    if cfg.REPR.ENABLED and schedule_from_config(old) != schedule_from_config(cfg):
        raise UserError(
            f"OUTPUT_DIR {saved.parent} holds a run with {schedule_from_config(old)}, this one has "
            f"{schedule_from_config(cfg)}: resume with the same schedule or give another OUTPUT_DIR"
        )


def _model_of_shapes(cfg: CfgNode, build: Callable[[], nn.Module] | None) -> nn.Module:
    """The model on the meta device: every module and shape, no numbers. On the CPU where its making needs numbers."""

    def from_config(device: str) -> nn.Module:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = device
        return build_model(own)

    try:
        with torch.device("meta"), _quiet():
            return build() if build is not None else from_config("meta")
    except Exception:  # either what is wrong with the config, which comes again, or .item() of a meta tensor
        pass
    try:
        with as_user_error("MODEL"), _quiet():
            return build() if build is not None else from_config("cpu")
    except UserError:
        raise
    except Exception as error:  # a config can make anything fail
        text = " ".join(str(error).split())
        raise UserError(f"MODEL: the model cannot be built: {type(error).__name__}: {text}") from error


def _check_weights(cfg: CfgNode, model: nn.Module, resume: bool, eval_only: bool) -> None:
    """Checks that the weights which the run begins with can be read and belong to this model."""
    trial = _TrialCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=False)
    resumed = resume and trial.has_checkpoint()
    path = trial.get_checkpoint_file() if resumed else cfg.MODEL.WEIGHTS
    if not path:
        if eval_only:
            raise UserError("--eval-only needs a checkpoint: give MODEL.WEIGHTS, or --resume for that of OUTPUT_DIR")
        return
    if not resumed:
        path = _local(path)
    trial._resuming = resumed or eval_only  # every weight must be there
    with _quiet(), as_user_error(path):
        trial.load(path)
    _check_for_sub_network(trial.weights, path, resumed, eval_only)


def _check_for_sub_network(weights: Mapping[str, Any], path: str, resumed: bool, eval_only: bool) -> None:
    if (resumed and not eval_only) or not (found := zero_filters(weights)):
        return
    name, filters = next(iter(found.items()))
    what = (
        f"{path} holds {sum(map(len, found.values()))} filters that are zero with their norm, {len(filters)} of them "
        f"in {name}: a sub-network"
    )
    if eval_only:
        logger.warning("%s, whose AP is not that of the full network: evaluate a checkpoint after a restore", what)
        return
    raise UserError(
        f"MODEL.WEIGHTS {what}, whose dropped filters would stay dead in a new run; give a checkpoint from outside the "
        "sub-network phase, or continue that run with --resume"
    )


def _local(weights: str) -> str:
    """The local file of MODEL.WEIGHTS, with its query (?matching_heuristics=True)."""
    url = urlparse(weights)
    file = url._replace(query="").geturl()
    local = local_file(file, "MODEL.WEIGHTS", ", or MODEL.WEIGHTS '' to train from random weights")
    if url.query not in ("", "matching_heuristics=True"):
        raise UserError(f"MODEL.WEIGHTS {weights!r}: after the file's name only ?matching_heuristics=True is known")
    return f"{local}?{url.query}" if url.query else local


class _TrialCheckpointer(AtomicCheckpointer):
    """Loads into the model of shapes, and keeps the weights."""

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        fit_names(checkpoint, self.model.state_dict())
        self.weights = dict(checkpoint["model"])
        return super()._load_model(checkpoint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of a model and weights that are only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
