"""Checks of config keys that need neither data nor a model; what Detectron2 checks is tried out, not checked again."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy
from detectron2.solver import build_optimizer
from PIL import Image
from torch import nn

from repr_det.detectron.config import as_user_error, scale_to_world
from repr_det.detectron.decay import decays_of_config
from repr_det.method.errors import UserError

logger = logging.getLogger(__name__)
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
_COUNTED_DETECTIONS = 100  # of an image, by COCO's AP


def check_device(cfg: CfgNode, num_gpus: int) -> None:
    """There are the device and the processes."""
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


def scaled_config(cfg: CfgNode, world_size: int) -> CfgNode:
    """The config as it trains."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}"
        )
    return scale_to_world(cfg, world_size)


def check_solver(cfg: CfgNode, num_gpus: int) -> None:
    """Checks the config as it trains, scaled to the number of processes."""
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, got {solver[key]}")
    if solver.IMS_PER_BATCH % num_gpus:  # several machines: ``world.check_processes``
        raise UserError(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of --num-gpus {num_gpus}")


def check_optimizer(cfg: CfgNode) -> None:
    """Detectron2 makes an optimizer and a learning-rate schedule of SOLVER, as it trains."""
    with as_user_error("SOLVER"):
        build_optimizer(cfg, nn.Linear(1, 1))
    solver = cfg.SOLVER
    settings = f"STEPS {tuple(solver.STEPS)}, MAX_ITER {solver.MAX_ITER}, LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}"
    with as_user_error(f"SOLVER: no learning-rate schedule of {settings}"):
        decays_of_config(cfg)
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d is no shorter than SOLVER.MAX_ITER %d: the learning rate never comes to "
            "SOLVER.BASE_LR",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )


def check_input(cfg: CfgNode) -> None:
    """Detectron2 can read, change and draw images as INPUT and DATALOADER say."""
    node = cfg.INPUT
    keys = ("RANDOM_FLIP", "MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING")
    settings = ", ".join(f"{key} {node[key]}" for key in keys)
    with as_user_error(f"INPUT: no augmentations of {settings}"):
        build_augmentation(cfg, True)
    if node.CROP.ENABLED:
        with as_user_error(f"INPUT.CROP: no crops of TYPE {node.CROP.TYPE}, SIZE {node.CROP.SIZE}"):
            transforms.RandomCrop(node.CROP.TYPE, node.CROP.SIZE)
    with as_user_error(f"INPUT.FORMAT {node.FORMAT!r} is none that Detectron2 reads images in (BGR, RGB, L)"):
        convert_PIL_to_numpy(Image.new("RGB", (1, 1)), node.FORMAT)
    if cfg.DATALOADER.SAMPLER_TRAIN not in _SAMPLERS:  # Detectron2 says so when all data are loaded
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN must be one of {', '.join(_SAMPLERS)}, got {cfg.DATALOADER.SAMPLER_TRAIN!r}"
        )


def check_evaluation(cfg: CfgNode) -> None:
    """Checks what Detectron2 looks at when all is trained."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        whole = isinstance(entry, (tuple, list)) and len(entry) == 4 and all(isinstance(x, str) for x in entry[:2])
        if not whole or not all(isinstance(x, (int, float)) for x in entry[2:]):
            raise UserError(f"TEST.EXPECTED_RESULTS must be a list of [task, metric, value, tolerance], got {entry!r}")
    if cfg.TEST.DETECTIONS_PER_IMAGE > _COUNTED_DETECTIONS:
        logger.warning(
            "TEST.DETECTIONS_PER_IMAGE is %d, and COCO's AP counts the best %d of an image: the others change nothing",
            cfg.TEST.DETECTIONS_PER_IMAGE,
            _COUNTED_DETECTIONS,
        )
