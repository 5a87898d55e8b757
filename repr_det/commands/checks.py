"""Checks of a run before it writes a file; what Detectron2 checks is tried, not checked again."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.modeling import GeneralizedRCNNWithTTA
from PIL import Image
from torch import nn

from repr_det.commands.data import check_datasets, check_number_of_keypoints, check_same_classes
from repr_det.datasets import class_names
from repr_det.detectron.config import (
    NAMES,
    as_user_error,
    changed,
    decays_of_config,
    options_of_config,
    quiet,
    scale_to_world,
    validate_repr_config,
)
from repr_det.detectron.engine import Trainer, check_same_arm
from repr_det.detectron.hook import RePrHook, saved_state
from repr_det.method.criteria import check_capacity
from repr_det.method.errors import UserError, spelling
from repr_det.method.layers import find_filter_layers
from repr_det.runs.checkpoints import AtomicCheckpointer, zero_filters
from repr_det.runs.files import refuse_used
from repr_det.runs.loader import SAMPLERS

logger = logging.getLogger(__name__)
_SIZE = {"height": 60, "width": 80}
_TEST_IMAGES = "INPUT: no test images by FORMAT {FORMAT}, MIN_SIZE_TEST {MIN_SIZE_TEST}, MAX_SIZE_TEST {MAX_SIZE_TEST}"
_TRAINING_IMAGES = (
    "INPUT: no images by RANDOM_FLIP {RANDOM_FLIP}, MIN_SIZE_TRAIN {MIN_SIZE_TRAIN}, MAX_SIZE_TRAIN {MAX_SIZE_TRAIN}, "
    "MIN_SIZE_TRAIN_SAMPLING {MIN_SIZE_TRAIN_SAMPLING}, CROP.TYPE {CROP.TYPE}, CROP.SIZE {CROP.SIZE}"
)


def check_run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    num_gpus: int = 1,
    num_machines: int = 1,
    trainer: type[Trainer] = Trainer,
) -> None:
    """Raises UserError, naming key, file or folder; ``num_gpus`` are processes on each machine, on the CPU too."""
    processes, scaled = num_gpus * num_machines, cfg
    _check_device(cfg, num_gpus)
    with as_user_error(f"SEED {cfg.SEED}"):
        np.random.RandomState(max(0, cfg.SEED) + processes - 1)  # the last rank's
    boxes = cfg.TEST.DETECTIONS_PER_IMAGE
    if boxes > 100:
        logger.warning(f"TEST.DETECTIONS_PER_IMAGE is {boxes}, and COCO's AP counts the best 100 of an image")
    if not eval_only:
        with as_user_error(f"SOLVER.REFERENCE_WORLD_SIZE, SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"):
            scaled = scale_to_world(cfg, processes)
        _check_solver(scaled, processes)
        validate_repr_config(scaled)
    _check_output_folder(cfg)
    if not (eval_only or resume):
        refuse_used(cfg.OUTPUT_DIR, "add --resume")
    summaries = check_datasets(cfg, eval_only)
    _check_input(scaled, eval_only)
    if resume and not eval_only:
        check_same_classes(class_names(cfg.DATASETS.TRAIN[0]), cfg.OUTPUT_DIR)
    model = model_of_shapes(scaled, trainer, eval_only)
    if cfg.MODEL.KEYPOINT_ON:
        check_number_of_keypoints(cfg, model, summaries)
    _check_model(cfg, model, eval_only, processes)
    _check_weights(scaled, model, resume, eval_only)


def _check_device(cfg: CfgNode, num_gpus: int) -> None:
    device = str(cfg.MODEL.DEVICE)
    with as_user_error(f"MODEL.DEVICE {device!r} is not a device, such as cuda or cpu"):
        kind = torch.device(device).type
    found = torch.cuda.device_count()
    if kind == "cuda" and found < num_gpus:
        raise UserError(
            f"MODEL.DEVICE is {device!r} but torch sees {found or 'no'} GPU for {num_gpus} process(es) here: lower "
            "--num-gpus, or add MODEL.DEVICE cpu"
        )
    if cfg.SOLVER.AMP.ENABLED and kind != "cuda":
        raise UserError(f"SOLVER.AMP.ENABLED needs a GPU in Detectron2, MODEL.DEVICE is {device!r}")


def _check_solver(cfg: CfgNode, processes: int) -> None:
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD", "MAX_TO_KEEP", "LOG_PERIOD"):
        if solver.get(key, 1) < 1:  # a LazyConfig has the last two
            raise UserError(f"SOLVER.{key} must be at least 1, got {solver[key]}")
    if batch % processes:
        right = max(1, batch // processes) * processes
        raise UserError(f"SOLVER.IMS_PER_BATCH {batch} must be a multiple of {processes} processes, such as {right}")
    settings = f"STEPS {tuple(solver.STEPS)}, MAX_ITER {solver.MAX_ITER}, LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}"
    with as_user_error(f"SOLVER: no learning-rate schedule of {settings}"):
        decays_of_config(cfg)
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is no shorter than SOLVER.MAX_ITER {solver.MAX_ITER}: the "
            "learning rate never comes to BASE_LR"
        )


def _check_input(cfg: CfgNode, eval_only: bool) -> None:
    loading = cfg.DATALOADER
    try_mapper(_TEST_IMAGES.format(**cfg.INPUT), lambda: DatasetMapper(cfg, False))
    with as_user_error(f"DATALOADER.NUM_WORKERS {loading.NUM_WORKERS}"):
        build_detection_test_loader((_SIZE,), mapper=str, num_workers=loading.NUM_WORKERS)
    if eval_only:
        return
    try_mapper(_TRAINING_IMAGES.format(**cfg.INPUT), lambda: DatasetMapper(cfg, True))
    samplers = [sampler.__name__ for sampler in SAMPLERS]
    if loading.SAMPLER_TRAIN not in samplers:
        raise UserError(f"DATALOADER.SAMPLER_TRAIN must be one of {', '.join(samplers)}, got {loading.SAMPLER_TRAIN!r}")
    with as_user_error(f"DATALOADER: {loading.SAMPLER_TRAIN} by REPEAT_THRESHOLD {loading.REPEAT_THRESHOLD}"), quiet():
        build_detection_train_loader(cfg, mapper=str, dataset=({"annotations": [{"category_id": 0}]},) * 10_000)


def try_mapper(source: str, build: Callable[[], Any]) -> None:
    """Raises UserError, which begins with ``source``, if a mapper cannot be built, or is Detectron2's and fails."""
    with as_user_error(source), quiet(), tempfile.NamedTemporaryFile(suffix=".png") as file:
        mapper = build()
        Image.new("RGB", (_SIZE["width"], _SIZE["height"])).save(file.name)
        if type(mapper) is DatasetMapper:  # others may ask for more than an image
            mapper(_SIZE | {"file_name": file.name})


def _check_output_folder(cfg: CfgNode) -> None:
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty: give a folder")
    folder = Path(cfg.OUTPUT_DIR)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # read-only, full, a file, a link to nowhere
        raise UserError(f"OUTPUT_DIR {folder} cannot be written ({error.strerror}): give another folder") from error


def model_of_shapes(cfg: CfgNode, trainer: type[Trainer], eval_only: bool) -> nn.Module:
    """Builds the model on the meta device, or on the CPU if it needs numbers; to train, tries its optimizer too."""

    def build(device: str) -> nn.Module:
        with torch.device(device), quiet():
            with as_user_error("MODEL"):
                model = trainer.build_model(changed(cfg, "MODEL.DEVICE", device))
            with as_user_error("SOLVER"):
                if not eval_only:
                    trainer.build_optimizer(cfg, model)
        return model

    try:
        return build("meta")
    except UserError:  # a wrong config, which raises again, or .item() of a meta tensor
        return build("cpu")


def _check_model(cfg: CfgNode, model: nn.Module, eval_only: bool, processes: int) -> None:
    if processes > 1 and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UserError(f"the norm {name} is SyncBN, which needs GPUs: several CPU processes need naiveSyncBN")
    if cfg.TEST.AUG.ENABLED:
        with as_user_error("TEST.AUG.ENABLED True"):
            mapper = GeneralizedRCNNWithTTA(changed(cfg, "TEST.AUG.FLIP", False), model).tta_mapper
            if not mapper(_SIZE | {"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}):
                raise UserError("TEST.AUG.MIN_SIZES is empty: give sizes, or set TEST.AUG.ENABLED to False")
    if cfg.REPR.ENABLED and not eval_only:
        options = options_of_config(cfg)
        with spelling(NAMES), quiet():  # training warns
            layers = find_filter_layers(model, options.layers, options.exclude)
            sizes = {layer.name: layer.num_filters for layer in layers}
            check_capacity(sizes, options.drop_ratio, options.max_drop_per_layer)


def _check_weights(cfg: CfgNode, model: nn.Module, resume: bool, eval_only: bool) -> None:
    trial = _TrialCheckpointer(model, cfg.OUTPUT_DIR, save_to_disk=False)
    resumed = resume and trial.has_checkpoint()
    path = trial.get_checkpoint_file() if resumed else cfg.MODEL.WEIGHTS
    if not path and eval_only:
        raise UserError("--eval-only needs a checkpoint: give MODEL.WEIGHTS or --resume")
    if not path:
        return
    trial._resuming = resumed or eval_only  # every weight must be there
    source = path if resumed else f"MODEL.WEIGHTS {path!r} cannot be read (give a file, or '' for random weights)"
    with quiet(), as_user_error(source):
        loaded = trial.load(path)
    if resumed and not eval_only:
        _check_same_training(cfg, loaded.get("trainer", {}))
        return
    if zeros := zero_filters(trial.weights):
        name = next(iter(zeros))
        what = f"{path} holds a sub-network: {len(zeros[name])} filters of {name} are zero with their norm"
        if not eval_only:
            raise UserError(f"MODEL.WEIGHTS {what}; give a checkpoint after a restore, or --resume that run")
        logger.warning("%s; its AP is not that of the full network", what)


def _check_same_training(cfg: CfgNode, trainer: dict[str, Any]) -> None:
    check_same_arm(trainer, cfg.REPR.ENABLED, cfg.OUTPUT_DIR)
    if cfg.REPR.ENABLED:
        own = changed(cfg, "SOLVER.REFERENCE_WORLD_SIZE", 0)  # it is scaled already
        hook = RePrHook(own)
        hook.schedule = validate_repr_config(own)
        hook.load_state_dict(saved_state(trainer))


class _TrialCheckpointer(AtomicCheckpointer):
    """Keeps the weights as the file has them."""

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.weights = dict(checkpoint["model"])
        return super()._load_model(checkpoint)
