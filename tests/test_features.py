"""Convs that are no filters keep all of theirs: predictions of a head, gates of squeeze and excitation."""

import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.modeling.backbone.regnet import SE
from torch import nn

from repr_det import UserError, find_filter_layers


def detectron2_model(config: str) -> nn.Module:
    with torch.device("meta"):
        cfg = model_zoo.get_config(config)
        if config.endswith(".py"):
            return instantiate(cfg.model)
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def torchvision_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)


def taken(model, *patterns):
    return {layer.name for layer in find_filter_layers(model, list(patterns))}


@pytest.mark.parametrize(
    ("config", "patterns", "wanted"),
    [
        (
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
            ["head.*"],
            {f"head.{kind}_subnet.{number}" for kind in ("cls", "bbox") for number in (0, 2, 4, 6)},
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            ["proposal_generator.*", "roi_heads.*"],
            {"proposal_generator.rpn_head.conv", *(f"roi_heads.mask_head.mask_fcn{i}" for i in (1, 2, 3, 4))},
        ),
        (
            "COCO-InstanceSegmentation/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
            ["backbone.bottom_up.s4.b1.*"],
            {f"backbone.bottom_up.s4.b1.{conv}" for conv in ("proj", "f.a", "f.b", "f.c")},
        ),
    ],
)
def test_detectron2(config, patterns, wanted, caplog):
    assert taken(detectron2_model(config), *patterns) == wanted
    assert "these put out something else than features" in caplog.text


@pytest.mark.parametrize(
    ("name", "pattern", "predictions"),
    [
        ("retinanet_resnet50_fpn", "head.*", ["cls_logits", "bbox_reg"]),
        ("fcos_resnet50_fpn", "head.*", ["cls_logits", "bbox_reg", "bbox_ctrness"]),
        ("maskrcnn_resnet50_fpn", "r*", ["cls_logits", "bbox_pred", "mask_fcn_logits"]),
        ("ssdlite320_mobilenet_v3_large", "head.*", [f"{level}.1" for level in range(6)]),
        ("ssd300_vgg16", "head.*", None),
    ],
)
def test_torchvision(name, pattern, predictions, caplog):
    model = torchvision_model(name)
    if predictions is None:  # each of its head's convs is one
        with pytest.raises(UserError, match=r"matches no trainable Conv2d \(not filters: head\.classification_head"):
            taken(model, pattern)
        return
    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith(pattern[:-1])}
    out = {n for n in convs if any(n.endswith(f".{prediction}") for prediction in predictions)}
    assert out and convs - out == taken(model, pattern)
    assert all(name in caplog.text for name in out)


class Excitation(nn.Module):
    """A name that says nothing: the structure does."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.reduce, self.expand = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = nn.Sequential(nn.Hardsigmoid())


@pytest.mark.parametrize(
    "gate",
    [Excitation(), SE(8, 4, nn.ReLU), torchvision.ops.SqueezeExcitation(8, 4)],
    ids=lambda gate: type(gate).__name__,
)
def test_gates(gate):
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "gate": gate})
    assert taken(net, "*") == {"conv"}
    with pytest.raises(UserError, match=r"matches no trainable Conv2d \(not filters: gate\.\w+.* \(a gate\)"):
        taken(net, "gate.*")


def test_what_only_resembles_them():
    classifier = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Sigmoid())
    assert taken(classifier, "*") == {"0", "2"}
    normed = nn.ModuleDict({"predictor": nn.Conv2d(3, 8, 3, bias=False), "bn": nn.BatchNorm2d(8)})
    assert taken(normed, "*") == {"predictor"}
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.ReLU())  # ASPP's image pooling
    assert taken(pooled, "*") == {"1"}
