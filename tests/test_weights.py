"""Weights under other names: the network computes what the one that they come from computes."""

import functools
import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn
from torchvision.models import resnet18, resnet50

from repr_det.commands.arguments import build_config
from repr_det.runs.checkpoints import AtomicCheckpointer, fit_names, zero_filters


@functools.cache
def pair(depth: int) -> tuple[nn.Module, nn.Module]:
    """torchvision's ResNet, and Detectron2's."""
    opts = ["MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    opts += ["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64" if depth == 18 else "256"]
    cfg = build_config("configs/baseline_r50_fpn.yaml", opts)
    ours = nn.ModuleDict({"bottom_up": build_resnet_backbone(cfg, ShapeSpec(channels=3))}).eval()
    torch.manual_seed(0)
    theirs = {18: resnet18, 50: resnet50}[depth](num_classes=3).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor.data, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return theirs, ours


WRAPPED = {
    "torchvision": lambda w: w,
    "lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "epoch": 3, "hyper_parameters": {}},
    "DDP": lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "optimizer": {"state": {}}},
    "DDP of a module": lambda w: {"model": {f"module.model.{k}": v for k, v in w.items()}},
    "MoCo": lambda w: {"state_dict": {f"module.encoder_q.{k}": v for k, v in w.items()}},
    "a detector": lambda w: {"model": {f"backbone.body.{k}": v for k, v in w.items()} | {"rpn.w": torch.zeros(2)}},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_the_same_features(tmp_path, caplog, form):
    theirs, ours = pair(50 if form == "torchvision" else 18)
    torch.save(WRAPPED[form](dict(theirs.state_dict())), tmp_path / "weights.pth")
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    with caplog.at_level(logging.INFO, "repr_det.resume"):
        AtomicCheckpointer(ours).load(str(tmp_path / "weights.pth"))
    assert len([r for r in caplog.records if "Names of a ResNet of torchvision or timm" in r.message]) == 1
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = nn.Sequential(*list(theirs.children())[:-3])(image)
        torch.testing.assert_close(ours["bottom_up"](image)["res4"], features)


def test_own_and_unknown_names_are_left_alone():
    """A model whose parameters do lie under "model." or "module."; a deep stem; two ResNets."""
    weights = {"model.conv.weight": torch.zeros(2)}
    checkpoint = {"model": dict(weights), "iteration": 3}
    fit_names(checkpoint, ["model.conv.weight", "model.conv.bias"])
    assert checkpoint == {"model": weights, "iteration": 3}
    fit_names(checkpoint, ["conv.weight"])
    assert list(checkpoint["model"]) == ["conv.weight"]
    deep_stem, two = ["conv1.0.weight", "layer1.0.conv1.weight"], ["q.layer1.0.conv1.weight", "k.layer1.0.conv1.weight"]
    for unknown in (deep_stem, two):
        checkpoint = {"model": dict.fromkeys(unknown, torch.zeros(2))}
        fit_names(checkpoint, ["stem.conv1.weight"])
        assert list(checkpoint["model"]) == unknown and "matching_heuristics" not in checkpoint


def conv_and_norm(rows=(), norm=()):
    net = nn.Sequential()
    net.conv = nn.Conv2d(3, 6, 3, bias=False)
    net.conv.norm = nn.BatchNorm2d(6)
    nn.init.normal_(net.conv.norm.bias)
    for tensor, zeros in ((net.conv.weight, rows), (net.conv.norm.weight, norm), (net.conv.norm.bias, norm)):
        tensor.data[list(zeros)] = 0
    return net.state_dict()


@pytest.mark.parametrize(
    ("rows", "norm", "expected"),
    [
        ((), (), {}),
        ((1, 4), (1, 4), {"conv": [1, 4]}),
        ((1, 4), (4,), {"conv": [4]}),
        ((), range(6), {}),  # zero_init_residual
        (range(6), range(6), {}),  # begins so, as deformable offsets do
    ],
)
def test_which_filters_are_switched_off(rows, norm, expected):
    weights = conv_and_norm(rows, norm)
    assert zero_filters(weights) == zero_filters({k: v.numpy() for k, v in weights.items()}) == expected
