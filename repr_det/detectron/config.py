"""The config node REPR, made from ``RePrOptions``, and the decays of a learning-rate schedule."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import LRMultiplier, build_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler

from repr_det.method.criteria import get_criterion
from repr_det.method.errors import UserError, spelling
from repr_det.method.loop import schedule_of
from repr_det.method.options import CONFIG_KEYS, RePrOptions, about_option, option_names
from repr_det.method.schedule import DECAYED, RePrSchedule

NAMES = CONFIG_KEYS | {"total_steps": "SOLVER.MAX_ITER"}
_STEP = 0.9  # a rate that falls to this share in one iteration has stepped
_SCALED = ("s1_iters", "s2_iters", "start_iter", "warmup_iters")  # with the number of workers


def add_repr_config(cfg: CfgNode) -> None:
    """Adds the node REPR to a Detectron2 config: ENABLED, and a key for every option of ``RePrOptions``."""
    cfg.REPR = CfgNode({"ENABLED": False})
    for name in option_names():
        about = about_option(name)
        *nodes, last = about.key.split(".")
        node = cfg.REPR
        for part in nodes:
            node = node.setdefault(part, CfgNode())
        node[last] = getattr(RePrOptions(), name) if about.in_config is None else about.in_config
    cfg.register_deprecated_key("REPR.SLIM")


def options_of_config(cfg: CfgNode) -> RePrOptions:
    """Raises OptionError if an option is out of range."""
    with spelling(NAMES):
        return RePrOptions(**{name: value_at(cfg.REPR, about_option(name).key) for name in option_names()})


def value_at(node: CfgNode, key: str) -> Any:
    for part in key.split("."):
        node = node[part]
    return node


def validate_repr_config(cfg: CfgNode) -> RePrSchedule | None:
    """Checks every key of REPR that can be checked without a model, with the scheduler that SOLVER names.

    Returns:
        The schedule; None if REPR.ENABLED is False.

    Raises:
        UserError: a key is wrong.
    """
    if not cfg.REPR.ENABLED:
        return None
    with spelling(NAMES):
        options = options_of_config(cfg)
        get_criterion(options.criterion)
        first = None
        if not options.s1_iters:
            with as_user_error(f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME}"):
                first = next(iter(decays_of_config(cfg)), None)
        schedule = schedule_of(options, cfg.SOLVER.MAX_ITER, first)
        schedule.check_fits(cfg.SOLVER.MAX_ITER)
    return schedule


def scale_to_world(cfg: CfgNode, world_size: int) -> CfgNode:
    """Detectron2's ``auto_scale_workers`` (SOLVER.REFERENCE_WORLD_SIZE) for SOLVER and REPR; a copy if changed."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    if "REPR" not in scaled:
        return scaled
    for name in _SCALED:
        key = about_option(name).key
        value = value_at(cfg.REPR, key)
        if value > 0:
            scaled = changed(scaled, f"REPR.{key}", max(1, round(value * reference / world_size)))
    scaled.freeze()
    return scaled


def changed(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """A copy with another value of a key, not frozen."""
    own = cfg.clone()
    own.defrost()
    own.merge_from_list([key, value])
    return own


def without_repr(cfg: CfgNode) -> CfgNode:
    """A copy without the REPR node, for stock Detectron2."""
    stock = cfg.clone()
    stock.defrost()
    del stock["REPR"]
    stock.freeze()
    return stock


def decays(scheduler: Any, max_iter: int) -> tuple[int, ...]:
    """The iterations at which the rate steps down; of a gradual fall (cosine, ...) the first at half of the peak, and
    none after it.

    Args:
        scheduler: fvcore's ParamScheduler, Detectron2's LRMultiplier, or one of torch that has not been stepped yet.
    """
    found: list[int] = []
    peak = before = 0.0
    for iteration, value in enumerate(_rates(scheduler, max_iter)):
        stepped = before > 0 and value <= _STEP * before
        halved = not found and peak > 0 and value <= DECAYED * peak
        if stepped or halved:
            found.append(iteration)
        if halved and not stepped:
            break
        peak, before = max(peak, value), value
    return tuple(found)


def _rates(scheduler: Any, max_iter: int) -> Iterator[float]:
    """The rate of every iteration, up to a factor. Of a scheduler of torch a copy is stepped, without parameters."""
    if isinstance(scheduler, (ParamScheduler, LRMultiplier)):
        multiplier, length = getattr(scheduler, "_multiplier", scheduler), getattr(scheduler, "_max_iter", max_iter)
        yield from (float(multiplier(iteration / length)) for iteration in range(max_iter))
        return
    if scheduler.last_epoch != 0:
        raise ValueError("it has been stepped")
    groups = [copy.deepcopy({**group, "params": []}) for group in scheduler.optimizer.param_groups]
    stand_in = SimpleNamespace(param_groups=groups, step=scheduler.optimizer.step, _opt_called=True)
    played = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    for _ in range(max_iter):
        yield max(float(group["lr"]) for group in groups)
        played.step()


def decays_of_config(cfg: CfgNode) -> tuple[int, ...]:
    """``decays`` of the scheduler that Detectron2 builds for SOLVER."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with quiet():  # it warns again when the run builds its own
        return decays(build_lr_scheduler(cfg, optimizer), cfg.SOLVER.MAX_ITER)


def defined_at_its_end(scheduler: LRMultiplier) -> LRMultiplier:
    """Gives a scheduler the rate after the last iteration that torch asks for and fvcore's equal steps lack."""
    multiplier = scheduler._multiplier
    scheduler._multiplier = lambda where: multiplier(min(where, 1 - 1e-5))  # beyond fvcore's tolerance of 1e-6
    return scheduler


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops logs and warnings of what is tried, or done again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def as_user_error(source: str) -> Iterator[None]:
    """Turns whatever config libraries raise into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a config can make anything fail
        # str() of a KeyError is the repr of its message.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        text = " ".join((f"not valid YAML: {text}" if isinstance(error, yaml.YAMLError) else text).split())
        if "<class 'tuple'> vs." in text:
            text += ": a tuple with one entry is written (ENTRY,), a name in quotes"
        raise UserError(f"{source}: {text or type(error).__name__}") from error
