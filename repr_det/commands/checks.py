"""Every check of a run that can be made before a file is written.

What Detectron2 checks is tried out, not checked again; the model is built without its numbers.
"""

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import GeneralizedRCNN
from detectron2.solver import build_optimizer
from PIL import Image
from torch import nn

from repr_det.commands.data import check_same_classes
from repr_det.commands.data_checks import check_datasets
from repr_det.commands.world import World
from repr_det.datasets import class_names
from repr_det.detectron.config import (
    as_user_error,
    naming_keys,
    options_of_config,
    scale_to_world,
    validate_repr_config,
)
from repr_det.detectron.decay import decays_of_config
from repr_det.detectron.engine import Trainer, check_same_arm
from repr_det.detectron.hook import RePrHook
from repr_det.method.criteria import check_capacity
from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.runs.checkpoints import AtomicCheckpointer, check_last_checkpoint, fit_names, zero_filters
from repr_det.runs.files import run_traces

logger = logging.getLogger(__name__)
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
_COUNTED_DETECTIONS = 100  # of an image, by COCO's AP


def check_run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    num_gpus: int = 1,
    world: World | None = None,
    trainer: type[Trainer] = Trainer,
) -> None:
    """Everything that can be known to be wrong before a file is written.

    Args:
        num_gpus: processes, all on this machine, unless ``world`` says more.
        world: the processes of the run.
        trainer: makes the model.

    Raises:
        UserError: naming the key, file or folder.
    """
    world = world or World(num_gpus, num_gpus, f"--num-gpus {num_gpus}")
    _check_device(cfg, world)
    if cfg.TEST.DETECTIONS_PER_IMAGE > _COUNTED_DETECTIONS:
        logger.warning(
            "TEST.DETECTIONS_PER_IMAGE is %d, and COCO's AP counts the best %d of an image: the others change nothing",
            *(cfg.TEST.DETECTIONS_PER_IMAGE, _COUNTED_DETECTIONS),
        )
    scaled = cfg
    if not eval_only:
        with as_user_error(f"SOLVER.REFERENCE_WORLD_SIZE, SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"):
            scaled = scale_to_world(cfg, world.size)
        _check_solver(scaled, world)
        validate_repr_config(scaled)
        _check_output_folder(cfg, resume)
    check_datasets(cfg, eval_only)
    if not eval_only:
        _check_input(scaled)
    if not eval_only and resume:
        check_same_classes(class_names(cfg.DATASETS.TRAIN[0]), cfg.OUTPUT_DIR)
    model = _model_of_shapes(cfg, trainer)
    _check_model(cfg, model, eval_only, world)
    _check_weights(scaled, model, resume, eval_only)


def _check_device(cfg: CfgNode, world: World) -> None:
    device = str(cfg.MODEL.DEVICE)
    with as_user_error(f"MODEL.DEVICE {device!r} is not a device, such as cuda or cpu"):
        kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {device!r} but torch sees no GPU: add MODEL.DEVICE cpu to the command line")
    if kind == "cuda" and torch.cuda.device_count() < world.local_size:
        raise UserError(
            f"{world.started}, but torch sees {torch.cuda.device_count()} GPU(s) here: start one process for each, or "
            "add MODEL.DEVICE cpu"
        )
    if cfg.SOLVER.AMP.ENABLED and kind != "cuda":
        raise UserError(f"SOLVER.AMP.ENABLED needs a GPU in Detectron2, MODEL.DEVICE is {device!r}: set it to False")


def _check_solver(cfg: CfgNode, world: World) -> None:
    """Detectron2 makes an optimizer and a learning-rate schedule of SOLVER, scaled as it trains."""
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, got {solver[key]}")
    if solver.IMS_PER_BATCH % world.size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of the {world.size} processes of this run "
            f"({world.started}): such as {max(1, solver.IMS_PER_BATCH // world.size) * world.size}"
        )
    with as_user_error("SOLVER"):
        build_optimizer(cfg, nn.Linear(1, 1))
    settings = f"STEPS {tuple(solver.STEPS)}, MAX_ITER {solver.MAX_ITER}, LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}"
    with as_user_error(f"SOLVER: no learning-rate schedule of {settings}"):
        decays_of_config(cfg)
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is no shorter than SOLVER.MAX_ITER %d: the learning rate never comes to "
            "SOLVER.BASE_LR",
            *(solver.WARMUP_ITERS, solver.MAX_ITER),
        )


def _check_input(cfg: CfgNode) -> None:
    """Detectron2 can read, change and draw images as INPUT and DATALOADER say."""
    keys = ("FORMAT", "RANDOM_FLIP", "MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING")
    settings = [f"{key} {cfg.INPUT[key]}" for key in keys]
    if cfg.INPUT.CROP.ENABLED:
        settings.append(f"CROP.TYPE {cfg.INPUT.CROP.TYPE}, CROP.SIZE {cfg.INPUT.CROP.SIZE}")
    with as_user_error(f"INPUT: no images by {', '.join(settings)}"), _quiet():
        DatasetMapper(cfg, True)
        convert_PIL_to_numpy(Image.new("RGB", (1, 1)), cfg.INPUT.FORMAT)
    if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:  # Detectron2 says so when all data are loaded
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN must be one of {', '.join(_SAMPLERS)}, got {cfg.DATALOADER.SAMPLER_TRAIN!r}"
        )


def _check_output_folder(cfg: CfgNode, resume: bool) -> None:
    """A new run gets a folder without another run's files; a resumed one the folder of the same run."""
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty: give the folder that the run is to write to")
    folder = Path(cfg.OUTPUT_DIR)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"OUTPUT_DIR {folder} is a link to {os.readlink(folder)}, which is not there")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUTPUT_DIR {folder} is a file, not a folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:  # read-only, full, a file among its parents
        raise UserError(f"OUTPUT_DIR {folder} cannot be written ({error.strerror}): give another folder") from error
    if not (traces := run_traces(folder)):
        return
    if not resume:
        raise UserError(
            f"OUTPUT_DIR {folder} holds another run ({', '.join(traces[:3])}): add --resume to continue it, or "
            "give another OUTPUT_DIR"
        )
    check_last_checkpoint(str(folder))


def _model_of_shapes(cfg: CfgNode, trainer: type[Trainer]) -> nn.Module:
    """The model on the meta device: every module and shape, no numbers. On the CPU where its making needs numbers."""

    def build(device: str) -> nn.Module:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = device
        with torch.device(device), _quiet():
            return trainer.build_model(own)

    try:
        return build("meta")
    except Exception:  # either what is wrong with the config, which comes again, or .item() of a meta tensor
        with as_user_error("MODEL"):
            return build("cpu")


def _check_model(cfg: CfgNode, model: nn.Module, eval_only: bool, world: World) -> None:
    """Norms that work on the device, test-time augmentation that Detectron2 has, convs that REPR.LAYERS matches."""
    if world.size > 1 and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UserError(
                    f"the norm {name} is SyncBN, which needs GPUs, and this run has {world.size} processes on the CPU: "
                    "use naiveSyncBN"
                )
    if cfg.TEST.AUG.ENABLED:
        unfit = [f"MODEL.{key}" for key in ("KEYPOINT_ON", "LOAD_PROPOSALS") if cfg.MODEL[key]]
        if not isinstance(model, GeneralizedRCNN):
            unfit.insert(0, type(model).__name__)
        if unfit:
            raise UserError(
                "TEST.AUG.ENABLED is True, but Detectron2 has test-time augmentation for GeneralizedRCNN, not "
                f"{unfit[0]}: set it to False"
            )
    if cfg.REPR.ENABLED and not eval_only:
        options = options_of_config(cfg)
        with naming_keys():
            layers = find_filter_layers(model, options.layers, options.exclude)
            sizes = {layer.name: layer.num_filters for layer in layers}
            check_capacity(sizes, options.drop_ratio, options.max_drop_per_layer)


def _check_weights(cfg: CfgNode, model: nn.Module, resume: bool, eval_only: bool) -> None:
    """The weights that the run begins with can be read and belong to this model."""
    trial = _TrialCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=False)
    resumed = resume and trial.has_checkpoint()
    path = trial.get_checkpoint_file() if resumed else cfg.MODEL.WEIGHTS
    if not path:
        if eval_only:
            raise UserError("--eval-only needs a checkpoint: give MODEL.WEIGHTS, or --resume for that of OUTPUT_DIR")
        return
    trial._resuming = resumed or eval_only  # every weight must be there
    source = path if resumed else f"MODEL.WEIGHTS {path!r} cannot be read (give a file, or '' for random weights)"
    with _quiet(), as_user_error(source):
        trial.load(path)
    if resumed and not eval_only:
        if trial.hooks is not None:
            _check_same_training(cfg, trial.hooks)
        return
    if not (zeros := zero_filters(trial.weights)):
        return
    name = next(iter(zeros))
    what = (
        f"{path} holds {sum(map(len, zeros.values()))} filters that are zero with their norm, {len(zeros[name])} of "
        f"them in {name}: a sub-network"
    )
    if not eval_only:
        raise UserError(
            f"MODEL.WEIGHTS {what}, whose dropped filters would stay dead in a new run; give a checkpoint from outside "
            "the sub-network phase, or continue that run with --resume"
        )
    logger.warning("%s, whose AP is not that of the full network: evaluate a checkpoint after a restore", what)


def _check_same_training(cfg: CfgNode, hooks: dict[str, Any]) -> None:
    """The checkpoint, whose state of hooks this is, is of the same arm, with the same options of RePr."""
    check_same_arm(hooks, cfg.REPR.ENABLED, cfg.OUTPUT_DIR)
    if cfg.REPR.ENABLED:
        own = cfg.clone()
        own.defrost()
        own.SOLVER.REFERENCE_WORLD_SIZE = 0  # it is scaled already
        RePrHook(own).load_state_dict(hooks[RePrHook.__qualname__])


class _TrialCheckpointer(AtomicCheckpointer):
    """Loads into the model of shapes, and keeps the weights and the state of the trainer's hooks."""

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        fit_names(checkpoint, self.model.state_dict())
        self.weights = dict(checkpoint["model"])
        self.hooks = checkpoint.get("trainer", {}).get("hooks")
        return super()._load_model(checkpoint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines and warnings of what is only tried."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
