"""A Detectron2 loop without a detector, for tests of the hook: two convs with norms, SimpleTrainer, and noise."""

import contextlib
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from conftest import At, interrupt
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.layers import Conv2d, get_norm
from torch import nn

from repr_det import RePrHook, add_repr_config
from repr_det.method.options import CONFIG_KEYS

CHANNELS = 12
# Four full steps, two of the sub-network: the drop comes after iteration 3, the restore after 5.
OPTIONS = {"s1_iters": 4, "s2_iters": 2, "num_cycles": 1, "layers": ["backbone.conv*"]}


class TwoConvs(nn.Module):
    """A backbone of Detectron2's convs, and a head that reads it; a batch is a tensor or list of images (1, 8, 8)."""

    def __init__(self, norm: str = "BN", channels: int = CHANNELS) -> None:
        super().__init__()
        conv = partial(Conv2d, kernel_size=3, padding=1, bias=False, activation=F.relu)
        first = conv(1, channels, norm=get_norm(norm, channels))
        second = conv(channels, channels, norm=get_norm(norm, channels))
        self.backbone = nn.Sequential(OrderedDict(conv1=first, conv2=second))
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, images):
        return {"loss": self.head(self.backbone(torch.stack(list(images)))).square().mean()}


def batch(number: int) -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(number))


def small_trainer(*hooks: HookBase, steps: int = 8, norm: str = "BN", rate: float = 0.05) -> SimpleTrainer:
    torch.manual_seed(0)
    model = TwoConvs(norm)
    trainer = SimpleTrainer(model, [batch(i) for i in range(steps)], torch.optim.SGD(model.parameters(), rate, 0.9))
    trainer.max_iter = steps
    trainer.register_hooks(hooks)
    return trainer


def train(trainer: SimpleTrainer, start: int = 0, stop: int | None = None) -> None:
    """Trains to the end, or is interrupted before iteration ``stop``."""
    stops = At(stop, interrupt)
    trainer.register_hooks([stops])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(start, trainer.max_iter)
    trainer._hooks.remove(stops)


def config(steps: int = 8, **options) -> CfgNode:
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.merge_from_list(["REPR.ENABLED", True, "OUTPUT_DIR", "", "SEED", 7, "SOLVER.STEPS", (), "MODEL.WEIGHTS", ""])
    cfg.merge_from_list(["SOLVER.MAX_ITER", steps, "SOLVER.IMS_PER_BATCH", 4])
    for name, value in options.items():
        cfg.merge_from_list([CONFIG_KEYS[name], value])
    return cfg


def hook_of(way: str, steps: int = 8, **options) -> RePrHook:
    """RePrHook(cfg), or RePrHook of the same plain arguments."""
    if way == "config":
        return RePrHook(config(steps, **options))
    return RePrHook(seed=7, total_steps=steps, **options)


def spelled(message: str, way: str) -> str:
    """A message with {names} of options, as whoever made the hook wrote them."""
    keywords = {name: f"{name}=" for name in (*CONFIG_KEYS, "total_steps")}
    return message.format_map(CONFIG_KEYS | {"total_steps": "SOLVER.MAX_ITER"} if way == "config" else keywords)
