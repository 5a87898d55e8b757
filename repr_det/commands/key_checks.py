"""Checks of config keys that need neither data nor a model."""

import math

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.solver import build_optimizer
from PIL import Image
from torch import nn

from repr_det.detectron.config import as_user_error, scale_to_world
from repr_det.detectron.decay import decays_of_config
from repr_det.method.errors import UserError


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
    """Of the config as it trains, scaled to the number of processes."""
    solver = cfg.SOLVER
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if getattr(solver, key) < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, got {getattr(solver, key)}")
    if solver.IMS_PER_BATCH % num_gpus:  # several machines: ``world.check_processes``
        raise UserError(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of --num-gpus {num_gpus}")
    rate = solver.BASE_LR
    if not (math.isfinite(rate) and rate >= 0):
        raise UserError(f"SOLVER.BASE_LR must be a finite number of at least 0, got {rate}")


def check_optimizer(cfg: CfgNode) -> None:
    """Detectron2 makes an optimizer and a learning-rate schedule of SOLVER. Of the config as it trains."""
    with as_user_error("SOLVER"):
        build_optimizer(cfg, nn.Linear(1, 1))
    solver = cfg.SOLVER
    settings = f"STEPS {tuple(solver.STEPS)}, MAX_ITER {solver.MAX_ITER}, LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME}"
    with as_user_error(f"SOLVER: no learning-rate schedule of {settings}"):
        decays_of_config(cfg)


_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")
_CROPS = ("relative", "relative_range", "absolute", "absolute_range")


def check_input(cfg: CfgNode) -> None:
    """How images are read, changed and drawn."""
    node = cfg.INPUT
    for key, value, choices in (
        ("INPUT.RANDOM_FLIP", node.RANDOM_FLIP, ("none", "horizontal", "vertical")),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", node.MIN_SIZE_TRAIN_SAMPLING, ("choice", "range")),
        ("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, _SAMPLERS),
        *([("INPUT.CROP.TYPE", node.CROP.TYPE, _CROPS)] if node.CROP.ENABLED else []),
    ):
        if value not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    sizes = node.MIN_SIZE_TRAIN
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and (not isinstance(sizes, (tuple, list)) or len(sizes) != 2):
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN must be (least, largest) where MIN_SIZE_TRAIN_SAMPLING is 'range', got {sizes!r}"
        )
    try:
        convert_PIL_to_numpy(Image.new("RGB", (1, 1)), node.FORMAT)
    except ValueError as error:
        raise UserError(
            f"INPUT.FORMAT {node.FORMAT!r} is none that Detectron2 reads images in: take BGR, RGB, L or YUV-BT.601"
        ) from error


def check_evaluation(cfg: CfgNode) -> None:
    """What Detectron2 looks at when all is trained."""
    for entry in cfg.TEST.EXPECTED_RESULTS:
        whole = isinstance(entry, (tuple, list)) and len(entry) == 4 and all(isinstance(x, str) for x in entry[:2])
        if not whole or not all(isinstance(x, (int, float)) for x in entry[2:]):
            raise UserError(f"TEST.EXPECTED_RESULTS must be a list of [task, metric, value, tolerance], got {entry!r}")
