"""Every check of a run that can be made before a model is built or a file written."""

import os
import tempfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from repr_det.datasets import check_registered, class_names
from repr_det.detectron.config import (
    add_repr_config,
    as_user_error,
    scale_to_world,
    schedule_from_config,
    validate_repr_config,
)
from repr_det.method.criteria import get_criterion
from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.method.selection import check_capacity
from repr_det.runs.checkpoints import check_last_checkpoint, find_checkpoint
from repr_det.runs.files import run_traces
from repr_det.runs.safe_pickle import load_checkpoint


def check_run(cfg: CfgNode, resume: bool = False, eval_only: bool = False, num_gpus: int = 1) -> None:
    """Everything that can be known to be wrong before a model is built or a file written.

    Raises:
        UserError: naming the key, file or folder.
    """
    _check_device(cfg, num_gpus)
    if not eval_only:
        validate_repr_config(cfg)
        check_output_folder(cfg, resume)
    check_datasets(cfg, eval_only)
    if cfg.REPR.ENABLED and not eval_only:
        check_layers(cfg)
    if not (resume and find_checkpoint(cfg.OUTPUT_DIR)):  # a resumed run reads its own checkpoint
        _check_weights(cfg)


def check_layers(cfg: CfgNode) -> None:
    """REPR.LAYERS matches trainable convs that RePr can handle, few enough for REPR.CRITERION, and the caps leave room
    for REPR.DROP_RATIO."""
    shapes_only = cfg.clone()
    shapes_only.defrost()
    shapes_only.MODEL.DEVICE = "meta"
    with as_user_error("MODEL"), torch.device("meta"):
        model = build_model(shapes_only)
    layers = find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE)
    sizes = {layer.name: layer.num_filters for layer in layers}
    check_capacity(sizes, cfg.REPR.DROP_RATIO, cfg.REPR.MAX_DROP_PER_LAYER)
    get_criterion(cfg.REPR.CRITERION, sum(sizes.values()))


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Every data set of the run exists, is well formed and has no more classes than the model."""
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name at least one registered data set")
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name at least one registered data set")
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    key = "MODEL.RETINANET.NUM_CLASSES" if retina else "MODEL.ROI_HEADS.NUM_CLASSES"
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES if retina else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        check_registered(name)
        if len(class_names(name)) != num_classes:
            raise UserError(f"{key} is {num_classes}, but {name} has {len(class_names(name))} classes: set it to that")


def check_output_folder(cfg: CfgNode, resume: bool) -> None:
    """A new run gets a folder without another run's files; a resumed one the folder of the same run."""
    folder = Path(cfg.OUTPUT_DIR)
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
    if not traces:
        return
    if not resume:
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(traces[:3])}): add --resume to continue it, or "
            "give another OUTPUT_DIR"
        )
    saved = folder / "config.yaml"
    if saved.exists():
        _check_same_run(cfg, saved)
    check_last_checkpoint(str(folder))


def _check_same_run(cfg: CfgNode, saved: Path) -> None:
    old = get_cfg()
    add_repr_config(old)
    try:
        with as_user_error(str(saved)):
            old.merge_from_file(str(saved))
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


def _check_device(cfg: CfgNode, num_gpus: int) -> None:
    if num_gpus < 1:
        raise UserError(f"--num-gpus must be at least 1, got {num_gpus}")
    device = str(cfg.MODEL.DEVICE)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE {device!r} is not a device: use cuda or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {device!r} but torch sees no GPU: add MODEL.DEVICE cpu to the command line")
    if kind == "cuda" and num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {num_gpus}, but torch sees {torch.cuda.device_count()} GPU(s)")
    if cfg.SOLVER.AMP.ENABLED and kind != "cuda":
        raise UserError(f"SOLVER.AMP.ENABLED needs a GPU in Detectron2, MODEL.DEVICE is {device!r}: set it to False")
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}"
        )
    if scale_to_world(cfg, num_gpus).SOLVER.IMS_PER_BATCH % num_gpus:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of --num-gpus {num_gpus}")


def _check_weights(cfg: CfgNode) -> None:
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        return
    try:
        local = PathManager.get_local_path(urlparse(weights)._replace(query="").geturl())
        found = os.path.isfile(local)
        reason = "it is not a file"
    except Exception as error:  # whatever a download handler raises, the user needs the same line
        found, reason = False, " ".join(str(error).split())
    if not found:
        raise UserError(
            f"MODEL.WEIGHTS {weights!r} cannot be read ({reason}): give the path of a local file, or MODEL.WEIGHTS '' "
            "to train from random weights"
        )
    load_checkpoint(local)
