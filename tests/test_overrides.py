"""Keys of a LazyConfig: typos in overrides are refused, what config and callables take is not, the unread are named."""

import copy

import pytest
import torch
from detectron2.config import LazyCall
from omegaconf import OmegaConf

from repr_det import UserError
from repr_det.commands.lazy_train import load_lazy_config
from repr_det.commands.overrides import refuse_unknown_keys
from repr_det.commands.reads import Reads
from repr_det.detectron.lazy import repr_cfg_from_lazy


def net(width: int, depth: int = 3, **more):
    return width


CFG = OmegaConf.create(
    {
        "model": LazyCall(torch.nn.Conv2d)(in_channels=3, out_channels=4, kernel_size=1),
        "net": LazyCall(net)(width=3),
        "optimizer": LazyCall(torch.optim.SGD)(lr=0.1),
        "train": {"max_iter": 3, "amp": {"enabled": False}, "checkpointer": {"period": 4}},
        "dataloader": {"train": {"mapper": {"augmentations": [{"size": 3}, {"size": 4}]}}},
    },
    flags={"allow_objects": True},
)


@pytest.mark.parametrize(
    "override, hint",
    [
        (
            "train.max_itr=5",
            "override train.max_itr: the config has no 'max_itr' in train; did you mean train.max_iter?",
        ),
        ("optimzer.lr=0.1", "the config has no 'optimzer' in it; did you mean optimizer?"),
        ("optimizer.learning_rate=0.1", "the config has no 'learning_rate' in optimizer; it has"),
        ("train.amp.enable=True", "did you mean train.amp.enabled?"),
        ("train.chekpointer.period=2", "did you mean train.checkpointer?"),
        ("model.kernel_sise=3", "did you mean model.kernel_size?"),
        ("dataloader.train.mapper.augmentations.2.size=3", "has no '2' in dataloader.train.mapper.augmentations"),
        (
            "dataloader.train.mapper.augmentations.0.sise=3",
            "did you mean dataloader.train.mapper.augmentations.0.size?",
        ),
        ("train.max_iter.x=3", "the config has no 'x' in train.max_iter"),
    ],
)
def test_typos(override, hint):
    with pytest.raises(UserError) as error:
        refuse_unknown_keys(CFG, ["train.max_iter=4", override])
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.max_iter=5",
        "train.seed=3",  # Detectron2 reads it, its own configs do not name it
        "optimizer.momentum=0.9",  # an argument of the callable
        "model.padding=1",
        "net.anything=1",  # of a callable that takes everything
        "dataloader.train.mapper.augmentations.1.size=3",
        "repr.NOPE=1",  # repr_cfg_from_lazy refuses it by its own name
        "+train.mine=3",
    ],
)
def test_what_may_be_set(override):
    refuse_unknown_keys(CFG, [override])


def test_what_nothing_reads_is_found_by_the_reads():
    """detrex's keys in the node train, and a node of one's own; Detectron2's own are all read by one process."""
    cfg = load_lazy_config("lazy/repr_faster_rcnn_r50_fpn.py", ["train.device=cpu", "train.init_checkpoint="])
    extra = {"clip_grad": {"enabled": True, "params": {"max_norm": 0.1}}, "model_ema": {"enabled": True}}
    for mine in ({}, extra):
        one = copy.deepcopy(cfg)
        one.train.update(mine)
        one.ema = {"decay": 0.9} if mine else {}
        one.image_size = 3  # used while the file was read
        reads = Reads(one)
        assert OmegaConf.select(one, "train.amp.enabled") is False and one.train.max_iter == 90000
        settings = repr_cfg_from_lazy(one)
        assert settings.SOLVER.MAX_ITER == 90000 and settings.MODEL.DEVICE == "cpu"
        unread = {"train.ddp", "train.log_period"}  # LazyTrainer reads them
        assert set(reads.unread()) == unread | ({"ema.decay", "train.clip_grad", "train.model_ema"} if mine else set())
