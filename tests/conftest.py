"""A COCO-format data set of 12 tiny images, registered as tiny_train and tiny_val, and a detector small enough to train
on it in seconds: its checkpoint has half a megabyte."""

import json
import logging
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_backbone  # noqa: F401
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det import Trainer, UserError
from repr_det.commands.arguments import build_config
from repr_det.datasets import register_coco_format

pytest_plugins = ["coco_folder", "finished_runs"]
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs" / "evidence"), str(ROOT / "tools")]
SMALL = """
MODEL.BACKBONE.NAME build_tiny_fpn_backbone MODEL.WEIGHTS '' MODEL.DEVICE cpu MODEL.PIXEL_STD [57.375,57.12,58.395]
MODEL.BACKBONE.FREEZE_AT 0
MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.NORM BN MODEL.FPN.OUT_CHANNELS 16
MODEL.ANCHOR_GENERATOR.SIZES [[8],[16],[32],[48],[64]] MODEL.RPN.PRE_NMS_TOPK_TRAIN 40 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.RPN.PRE_NMS_TOPK_TEST 40 MODEL.RPN.POST_NMS_TOPK_TEST 20 MODEL.RPN.BATCH_SIZE_PER_IMAGE 32
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.NUM_CLASSES 2 MODEL.ROI_BOX_HEAD.NUM_FC 1
MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 3 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96
INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96 DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.005
SOLVER.WARMUP_ITERS 2 SOLVER.CHECKPOINT_PERIOD 1000 SEED 7 DATASETS.TRAIN ('tiny_train',) DATASETS.TEST ('tiny_val',)
""".split()
SCHEDULE = "SOLVER.MAX_ITER 8 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 2".split()
R18 = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")  # instead of the tiny backbone


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# torch 2.4 compiles while a dispatch mode traces, and fails.
COMPILES = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")


def assert_same_weights(a: dict, b: dict) -> None:
    """Two state dicts, bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def refused(action, *args, **options) -> str:
    """The one line by which a call is refused."""
    with pytest.raises(UserError) as error:
        action(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class At(HookBase):
    """Calls ``action`` before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.action()


def interrupt():
    raise KeyboardInterrupt


def trained(cfg, *hooks, resume=False, kind=Trainer):
    """A trainer that has trained."""
    seed_all_rng(99 if resume else 5)
    trainer = kind(cfg)
    trainer.register_hooks(hooks)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def end_of(cfg, *hooks, resume=False) -> dict:
    """The state dict that a training ends with."""
    return trained(cfg, *hooks, resume=resume).model.state_dict()


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """Detectron2's setup_logger, which commands call, would hide lines from caplog in the tests after it."""
    yield
    for name in ("detectron2", "fvcore", "repr_det"):
        logger = logging.getLogger(name)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with images/ and tiny.json: 12 images of 64 x 96 px (half of them upright) with 1 to 3 boxes."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(12):
        height, width = ((64, 96), (96, 64))[number % 2]
        image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for _ in range(rng.integers(1, 4)):
            kind = int(rng.integers(2))
            w, h = (int(v) for v in rng.integers(12, 40, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            image[y : y + h, x : x + w, kind] = 220
            own = dict(id=len(annotations) + 1, image_id=number, category_id=kind + 1)
            annotations.append(dict(own, bbox=[x, y, w, h], area=w * h, iscrowd=0))
        cv2.imwrite(str(root / "images" / f"{number}.png"), image)
        images.append(dict(id=number, file_name=f"{number}.png", height=height, width=width))
    categories = [dict(id=1, name="blue"), dict(id=2, name="green")]
    (root / "tiny.json").write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    for name in ("tiny_train", "tiny_val"):
        register_coco_format(name, str(root / "tiny.json"), str(root / "images"))
    return root


@pytest.fixture
def tiny_cfg(tiny_data, tmp_path):
    """``tiny_cfg(KEY, VALUE, ...)`` -> a frozen config for the tiny detector with OUTPUT_DIR in tmp_path."""

    def make(*opts, config="baseline_r50_fpn.yaml"):
        own = [*SMALL, "OUTPUT_DIR", str(tmp_path / "run")]
        return build_config(str(ROOT / "configs" / config), [*own, *map(str, opts)])

    return make
