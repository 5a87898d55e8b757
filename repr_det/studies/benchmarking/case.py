"""One detector of the benchmark: its config, model, synthetic batches and trainer."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from repr_det.commands.config_files import merge_config_file
from repr_det.detectron.config import add_repr_config
from repr_det.detectron.hook import RePrHook
from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.passes import TrainingPasses
from repr_det.method.slim import SlimNetwork

DEPTHS = (18, 34, 50, 101, 152)
# "small": the heads of a configuration that a CPU trains, so that the backbone is what counts.
HEADS = {
    "stock": [],
    "small": """MODEL.RPN.PRE_NMS_TOPK_TRAIN 300 MODEL.RPN.POST_NMS_TOPK_TRAIN 100 MODEL.ROI_BOX_HEAD.NUM_FC 1
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64 MODEL.ROI_BOX_HEAD.FC_DIM 256""".split(),
}
NORMS = ("FrozenBN", "BN", "SyncBN", "GN")
_BOXES = 5


@dataclass(frozen=True)
class Case:
    """Faster R-CNN with FPN on images of one size.

    Attributes:
        depth: of the ResNet.
        ratio: share of the filters of every layer that is dropped.
        size: height of the images, px.
        width: their width, px; 0 makes them square.
        batch: images in a step.
        heads: a key of HEADS.
        norm: of the backbone. FrozenBN freezes the stem and res2 as the stock configs do; with any other all train.
        device: "cpu" or "cuda".
        amp: mixed precision.
    """

    depth: int = 50
    ratio: float = 0.3
    size: int = 320
    batch: int = 2
    heads: str = "small"
    norm: str = "FrozenBN"
    device: str = "cpu"
    amp: bool = False
    width: int = 0

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ("--depths", self.depth, DEPTHS),
            ("--heads", self.heads, tuple(HEADS)),
            ("--norm", self.norm, NORMS),
        ):
            if value not in choices:
                raise UserError(f"{flag} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if not 0 < self.ratio < 1:
            raise UserError(f"--ratios must be in (0, 1), got {self.ratio}")
        if min(self.shape) < 64 or self.batch < 1:
            raise UserError(
                f"--sizes must be at least 64 and --batches at least 1, got {min(self.shape)} and {self.batch}"
            )
        if self.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device is {self.device!r} but torch sees no GPU: use cpu")
        if self.amp and self.device == "cpu":
            raise UserError("--amp needs a GPU in Detectron2, --device is 'cpu'")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.size, self.width or self.size

    @property
    def name(self) -> str:
        precision = " AMP" if self.amp else ""
        sides = f"{self.size} x {self.width}" if self.width else f"{self.size}"
        return f"R{self.depth}-FPN {self.norm} {self.heads}{precision}, {self.ratio:g}, {self.batch} x {sides} px"


def stock_step(config_file: str) -> tuple[int, tuple[int, int]]:
    """Images and their largest height and width in a step of one of the 8 GPUs that a stock config is for."""
    cfg = _read_config(config_file)
    return max(1, cfg.SOLVER.IMS_PER_BATCH // 8), (max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN)


def _read_config(config_file: str) -> CfgNode:
    if not os.path.isfile(config_file):
        raise UserError(f"--config-file {config_file!r} is not a file")
    cfg = get_cfg()
    add_repr_config(cfg)
    merge_config_file(cfg, config_file)
    return cfg


def build_config(case: Case, config_file: str) -> CfgNode:
    """The config of the case, RePr on, the same share dropped in every layer, no calibration passes."""
    cfg = _read_config(config_file)
    cfg.merge_from_list(HEADS[case.heads])
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = case.device
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.RESNETS.DEPTH = case.depth
    cfg.MODEL.RESNETS.NORM = case.norm
    cfg.MODEL.BACKBONE.FREEZE_AT = 2 if case.norm == "FrozenBN" else 0
    if case.depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    # The step does the same work whatever the learning rate; with 0 no random network can diverge.
    cfg.SOLVER.BASE_LR = 0.0
    cfg.SOLVER.AMP.ENABLED = case.amp
    cfg.SEED = 1
    cfg.SOLVER.IMS_PER_BATCH = case.batch
    cfg.REPR.ENABLED = True
    cfg.REPR.SLIM = False
    cfg.REPR.DROP_RATIO = cfg.REPR.MAX_DROP_PER_LAYER = case.ratio
    cfg.REPR.REINIT.FROZEN_NORM = "keep"
    return cfg


def build_detector(cfg: CfgNode) -> nn.Module:
    """The model with random weights, scaled so that FrozenBN, which normalises nothing, does not let it explode."""
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg)
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        last = "conv2.norm.weight" if cfg.MODEL.RESNETS.DEPTH < 50 else "conv3.norm.weight"
        for name, buffer in model.backbone.bottom_up.named_buffers():
            if name.endswith(last):
                buffer.fill_(0.2)
    return model


def filter_layers(model: nn.Module, cfg: CfgNode) -> list[FilterLayer]:
    return find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE)


def even_masks(layers: list[FilterLayer], ratio: float, seed: int = 0) -> dict[str, Tensor]:
    """Layer name -> (J,) bool with ``ratio`` of the filters of every layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for layer in layers:
        mask = torch.zeros(layer.num_filters, dtype=torch.bool)
        mask[torch.randperm(layer.num_filters, generator=generator)[: round(ratio * layer.num_filters)]] = True
        masks[layer.name] = mask.to(layer.weight.device)
    return masks


def synthetic_batch(case: Case, seed: int = 0) -> list[dict]:
    """Images of noise with a few random boxes each, as Detectron2's data loaders give them."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    batch = []
    height, width = case.shape
    sides = torch.tensor([width, height])
    for _ in range(case.batch):
        corner, extent = rand(_BOXES, 2) * 0.6 * sides, 16 + rand(_BOXES, 2) * 0.3 * sides
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.cat([corner, corner + extent], 1).clamp(max=sides.repeat(2)))
        target.gt_classes = torch.zeros(_BOXES, dtype=torch.long)
        image = (rand(3, height, width) * 255).to(torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": target})
    return batch


class SyntheticLoader:
    """Two synthetic batches in turn, for ever and from the first on for everybody who iterates."""

    def __init__(self, case: Case) -> None:
        self.batches = [synthetic_batch(case, seed) for seed in range(2)]

    def __iter__(self) -> Iterator[list[dict]]:
        return itertools.cycle(self.batches)


class Bench:
    """A detector with its trainer and, with ``repr_on``, RePrHook, stepped by hand.

    Use as a context manager: Detectron2's heads log into the storage of the innermost one.

    Args:
        case: what to build.
        config_file: the config that the case changes.
        repr_on: register RePrHook.
        opts: KEY, VALUE, ... over those of the case.
    """

    def __init__(self, case: Case, config_file: str, repr_on: bool, opts: Sequence[Any] = ()) -> None:
        self.case = case
        self.cfg = build_config(case, config_file)
        self.cfg.merge_from_list(list(opts))
        self.model = build_detector(self.cfg)
        batches = SyntheticLoader(case)
        inner = AMPTrainer if case.amp else SimpleTrainer
        self.trainer = inner(self.model, batches, build_optimizer(self.cfg, self.model))
        self.trainer.iter = self.trainer.start_iter = 0
        self.trainer.max_iter = self.cfg.SOLVER.MAX_ITER
        self.hook: RePrHook | None = RePrHook(self.cfg) if repr_on else None
        if self.hook is not None:
            self.trainer.register_hooks([self.hook])

    def __enter__(self) -> "Bench":
        self.trainer.storage = EventStorage(0).__enter__()
        if self.hook is not None:
            self.hook.before_train()
        return self

    def __exit__(self, *exception: object) -> None:
        self.trainer.storage.__exit__(*exception)

    def step(self, seed: int) -> None:
        """One iteration as TrainerBase.train runs it, with the same random proposals for the same seed."""
        torch.manual_seed(seed)
        self.trainer.before_step()
        self.trainer.run_step()
        self.trainer.after_step()

    def slim(self, multiple: int | None = None) -> SlimNetwork:
        scheme = self.hook.scheme
        options = {} if multiple is None else {"multiple": multiple}
        return SlimNetwork(self.model, scheme.layers, scheme.masks, **options)

    def passes(self) -> TrainingPasses:
        """Passes over synthetic batches, as calibration and data-driven criteria ask for them."""
        return TrainingPasses(
            self.model,
            batches=lambda number, cycle: [synthetic_batch(self.case, seed) for seed in range(number)],
            loss=lambda batch: sum(self.model(batch).values()),
            join=lambda many: list(itertools.chain.from_iterable(many)),
        )


@contextmanager
def patched(owner: object, name: str, make: Callable) -> Iterator[None]:
    """``owner.name`` is ``make(original)`` inside."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
