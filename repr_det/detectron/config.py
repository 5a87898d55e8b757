"""The config node REPR: its keys, their checks and the schedule that they stand for."""

import contextlib
import math
import re
from typing import Any

import yacs.config
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from repr_det.detectron.decay import decays_of_config
from repr_det.method.criteria import get_criterion
from repr_det.method.errors import UserError
from repr_det.method.returning import check_reinit
from repr_det.method.schedule import RePrSchedule
from repr_det.method.selection import check_shares
from repr_det.method.slim_choice import check_slim

CALIBRATION_IMAGES = 8


def _let_slim_be_string_or_bool() -> None:
    """yacs lets a value replace one of its own type only, for every key of every config; REPR.SLIM has two types."""
    check = yacs.config._check_and_coerce_cfg_value_type

    def checked(replacement: Any, original: Any, key: str, full_key: str) -> Any:
        if full_key == "REPR.SLIM":  # validate_repr_config looks at what it is
            return replacement
        return check(replacement, original, key, full_key)

    yacs.config._check_and_coerce_cfg_value_type = checked


_let_slim_be_string_or_bool()


def add_repr_config(cfg: CfgNode) -> None:
    """Adds the node REPR with its defaults to a Detectron2 config."""
    node = cfg.REPR = CfgNode()
    node.ENABLED = False
    # Iterations of the full network and of the sub-network in one cycle. Both 0: derived, NUM_CYCLES cycles with
    # S1 : S2 = 2 : 1 in the first three quarters of the iterations before the learning rate decays (before its first
    # step, or before half of it where it falls gradually; of MAX_ITER where it never does): 10000 / 5000 on the 1x
    # schedule, 35000 / 17500 on 3x.
    node.S1_ITERS = 0
    node.S2_ITERS = 0
    node.NUM_CYCLES = 3
    # Plain training before the first cycle.
    node.START_ITER = 0
    # Share of all filters that a drop takes, and the most that it may take of any one layer (rounded up).
    node.DROP_RATIO = 0.3
    node.MAX_DROP_PER_LAYER = 0.5
    # A name in repr_det.method.criteria.CRITERIA, and the training batches that criteria may look at.
    node.CRITERION = "ortho"
    node.CRITERION_BATCHES = 8

    node.LAYERS = CfgNode()
    # fnmatch patterns on the names of Conv2d modules: FPN backbones, C4 backbones, C4's box head. Frozen convs never
    # take part. An error only where the whole list matches none.
    node.LAYERS.INCLUDE = ["backbone.bottom_up.res*.conv*", "backbone.res*.conv*", "roi_heads.res5.*.conv*"]
    node.LAYERS.EXCLUDE = []

    node.REINIT = CfgNode()
    # Norm of a new filter: that of the filters that stayed (mean), its own before the drop, or 1.
    node.REINIT.SCALE = "kept"
    # FrozenBN statistics of a restored channel: set so that its moments after the norm are those before the drop,
    # measured on CALIBRATION_BATCHES training batches (0: as many as have 8 images), or kept as they are. A channel
    # whose ReLU never opened gets the median moments of those of its layer that do.
    node.REINIT.FROZEN_NORM = "recalibrate"
    node.REINIT.CALIBRATION_BATCHES = 0
    # How loud filters return: "as_published" with gamma 1; "median_gamma" of the kept filters of the layer; or
    # "function_preserving", so that a restore changes no output and filters earn their way in. Not in the paper.
    node.REINIT.RETURN = "as_published"
    # Iterations of linear learning-rate warm-up after every restore that brought filters back; -1: as long as they were
    # out, S2_ITERS. Not in the paper.
    node.REINIT.WARMUP_ITERS = 0
    # Leave dropped channels out of the computation (True) instead of computing zeros (False): the same numbers up to
    # rounding, fewer FLOPs, more kernels. "auto": the first training step of the first sub-network finds out which
    # costs less, on a GPU by timing both on its batch, on a CPU by a count of operations and bytes.
    node.SLIM = "auto"


def validate_repr_config(cfg: CfgNode) -> RePrSchedule | None:
    """Checks every key of REPR that can be checked without a model.

    Returns:
        The schedule, or None where REPR.ENABLED is False.

    Raises:
        UserError: naming the key, its value and what would be right.
    """
    node = cfg.REPR
    if not node.ENABLED:
        return None
    check_shares(node.DROP_RATIO, node.MAX_DROP_PER_LAYER)
    if node.MAX_DROP_PER_LAYER < node.DROP_RATIO:
        raise UserError(
            f"REPR.MAX_DROP_PER_LAYER must be at least REPR.DROP_RATIO {node.DROP_RATIO}, got {node.MAX_DROP_PER_LAYER}"
        )
    get_criterion(node.CRITERION)
    check_slim(node.SLIM)
    check_reinit(node.REINIT.SCALE, node.REINIT.FROZEN_NORM, node.REINIT.RETURN)
    for key, value, least in (
        ("CRITERION_BATCHES", node.CRITERION_BATCHES, 1),
        ("REINIT.CALIBRATION_BATCHES", node.REINIT.CALIBRATION_BATCHES, 0),
        ("REINIT.WARMUP_ITERS", node.REINIT.WARMUP_ITERS, -1),
    ):
        if value < least:
            raise UserError(f"REPR.{key} must be at least {least}, got {value}")
    schedule = schedule_from_config(cfg)
    schedule.check_fits(cfg.SOLVER.MAX_ITER)
    return schedule


def calibration_batches(cfg: CfgNode) -> int:
    """Batches, each of SOLVER.IMS_PER_BATCH over all ranks, that a calibration of FrozenBN looks at.

    Eight images give a channel's standard deviation to about 3 %, see docs/performance.md.
    """
    return cfg.REPR.REINIT.CALIBRATION_BATCHES or math.ceil(CALIBRATION_IMAGES / cfg.SOLVER.IMS_PER_BATCH)


def schedule_from_config(cfg: CfgNode) -> RePrSchedule:
    """The RePr schedule of a config, derived where S1_ITERS and S2_ITERS are 0."""
    node = cfg.REPR
    if (node.S1_ITERS == 0) != (node.S2_ITERS == 0):
        raise UserError(
            f"REPR.S1_ITERS {node.S1_ITERS} and REPR.S2_ITERS {node.S2_ITERS}: set both, or leave both 0 to derive them"
        )
    if node.S1_ITERS == 0:
        with as_user_error(f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME}"):
            found = decays_of_config(cfg)
        return RePrSchedule.derive(cfg.SOLVER.MAX_ITER, next(iter(found), None), node.NUM_CYCLES, node.START_ITER)
    return RePrSchedule(node.S1_ITERS, node.S2_ITERS, node.NUM_CYCLES, node.START_ITER)


def scale_to_world(cfg: CfgNode, world_size: int) -> CfgNode:
    """Detectron2's ``auto_scale_workers`` (SOLVER.REFERENCE_WORLD_SIZE) for SOLVER and REPR alike.

    Returns:
        ``cfg`` itself where nothing has to be scaled, else a scaled copy.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    scaled.defrost()
    node = scaled.get("REPR")
    numbers = (
        [(node, "START_ITER"), (node, "S1_ITERS"), (node, "S2_ITERS"), (node.REINIT, "WARMUP_ITERS")] if node else []
    )
    for holder, key in numbers:
        if (value := getattr(holder, key)) > 0:
            setattr(holder, key, max(1, round(value * reference / world_size)))
    scaled.freeze()
    return scaled


def without_repr(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` without the REPR node, which stock Detectron2 tools read."""
    stock = cfg.clone()
    stock.defrost()
    del stock["REPR"]
    stock.freeze()
    return stock


_ONE_FOR_A_TUPLE = re.compile(  # how yacs words it
    r"Type mismatch \(<class 'tuple'> vs\. <class '(?P<kind>str|int|float)'>\) .* vs\. (?P<value>.+)\) for config key: "
    r"(?P<key>\S+)"
)


@contextlib.contextmanager
def as_user_error(source: str):
    """Config libraries raise KeyError, ValueError, AssertionError and yaml errors for what a user typed."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        # str() of a KeyError is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = " ".join((f"not valid YAML: {text}" if isinstance(error, yaml.YAMLError) else text).split())
        one = _ONE_FOR_A_TUPLE.search(text)
        if one:
            value = repr(one["value"]) if one["kind"] == "str" else one["value"]
            text = f"{one['key']} must be a tuple, ({value},), got {value}"
        raise UserError(f"{source}: {text or type(error).__name__}") from error
