"""Candidates in Detectron2's models, those that a training pass lets take part, and what one filter of each is."""

import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from found_layers import names, refused
from torch import nn
from traced_nets import build as build_net
from traced_nets import reasons

from repr_det.method.layers import find_filter_layers, zero_rows_
from repr_det.method.participants import Participants

DEFAULT_INCLUDE = ["backbone.bottom_up.res*.conv*", "backbone.res*.conv*", "roi_heads.res5.*.conv*"]
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
CONVS = {18: 2, 50: 3}
KINDS = ("lateral", "output")  # of FPN's convs


def build(kind: str, depth: int, freeze_at: int, norm: str = "FrozenBN", **keys) -> nn.Module:
    """Faster R-CNN with random weights on the CPU; heads as small as they go, the backbone of full width."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    if kind == "fpn":
        levels = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = levels
        cfg.MODEL.FPN.OUT_CHANNELS = 32
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = levels = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    if kind == "retinanet":
        cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CLASSES = depth, 16, 2
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = norm, freeze_at
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return build_model(cfg)


def stage_convs(prefix: str, depth: int, stages) -> list[str]:
    return [
        f"{prefix}.res{stage}.{block}.conv{conv}"
        for stage in stages
        for block in range(BLOCKS[depth][stage - 2])
        for conv in range(1, CONVS[depth] + 1)
    ]


# --- Detectron2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "depth", "freeze_at", "expected", "filters"),
    [
        # 22,656 filters in an R50 (repr-method.md), of which 3 x (64 + 64 + 256) are in res2.
        ("fpn", 50, 0, stage_convs("backbone.bottom_up", 50, (2, 3, 4, 5)), 22656),
        ("fpn", 50, 2, stage_convs("backbone.bottom_up", 50, (3, 4, 5)), 22656 - 1152),
        ("fpn", 50, 3, stage_convs("backbone.bottom_up", 50, (4, 5)), 22656 - 1152 - 4 * (128 + 128 + 512)),
        ("fpn", 18, 0, stage_convs("backbone.bottom_up", 18, (2, 3, 4, 5)), 4 * (64 + 128 + 256 + 512)),
        ("fpn", 18, 2, stage_convs("backbone.bottom_up", 18, (3, 4, 5)), 4 * (128 + 256 + 512)),
        ("c4", 50, 0, stage_convs("backbone", 50, (2, 3, 4)) + stage_convs("roi_heads", 50, (5,)), 22656),
        ("c4", 50, 2, stage_convs("backbone", 50, (3, 4)) + stage_convs("roi_heads", 50, (5,)), 22656 - 1152),
    ],
)
def test_default_patterns_take_the_residual_convs_that_train(kind, depth, freeze_at, expected, filters):
    model = build(kind, depth, freeze_at)
    layers = find_filter_layers(model, DEFAULT_INCLUDE)
    assert names(layers) == expected
    assert sum(layer.num_filters for layer in layers) == filters
    for layer in layers:
        assert layer.conv is model.get_submodule(layer.name)
        assert layer.norm is layer.conv.norm and layer.kind == "frozen"
        assert layer.weight is layer.conv.weight and layer.output_module() is layer.conv


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN", "GN", "FrozenBN"])
def test_norm_of_every_conv_is_found(norm):
    layers = find_filter_layers(build("fpn", 18, 0, norm), DEFAULT_INCLUDE)
    kind = {"GN": "group", "FrozenBN": "frozen"}.get(norm, "batch")
    assert len(layers) == 16 and {layer.kind for layer in layers} == {kind}


def test_fpn_convs_can_be_switched_on_and_layers_off():
    model = build("fpn", 18, 2)
    fpn = [f"backbone.fpn_{part}{level}" for level in (2, 3, 4, 5) for part in ("lateral", "output")]
    layers = find_filter_layers(model, [*DEFAULT_INCLUDE, "backbone.fpn_*"], ["*.conv2", "*.res5.*"])
    # In the order of the model: FPN registers its lateral and output convs before the backbone that they sit on.
    assert sorted(names(layers)) == sorted(
        [*fpn, *(n for n in stage_convs("backbone.bottom_up", 18, (3, 4)) if n.endswith("conv1"))]
    )
    order = [name for name, _ in model.named_modules() if name in names(layers)]
    assert names(layers) == order
    for layer in layers:
        if "fpn" in layer.name:
            assert layer.kind == "none" and list(layer.tensors()) == ["weight", "bias"]


def test_fpn_convs_with_a_norm():
    layers = find_filter_layers(build("fpn", 18, 2, MODEL__FPN__NORM="GN"), ["backbone.fpn_*"])
    assert len(layers) == 8 and {layer.kind for layer in layers} == {"group"}


def batch(height=96, width=128):
    """Two images with two boxes each, as Detectron2's models take them."""
    boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [40, 30, 110, 90]]))
    for _ in range(2):
        found = Instances((height, width), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
        yield dict(image=torch.randint(0, 255, (3, height, width)).float(), instances=found)


def taking_part(model: nn.Module) -> dict[str, str | None]:
    """Conv -> norm of all trainable convs that a training pass lets take part."""
    participants = Participants(find_filter_layers(model, ["*"]), model)
    with EventStorage(0):
        model.train()(list(batch()))
    return {layer.name: layer.norm_name for layer in participants.agreed()}


HEADS = {
    "fpn": ["proposal_generator.rpn_head.conv", *(f"backbone.fpn_{k}{n}" for n in (2, 3, 4, 5) for k in KINDS)],
    "c4": ["proposal_generator.rpn_head.conv"],
    "retinanet": [
        *(f"backbone.fpn_{k}{n}" for n in (3, 4, 5) for k in KINDS),
        *("backbone.top_block.p6", "backbone.top_block.p7"),
        *(f"head.{part}_subnet.{number}" for part in ("cls", "bbox") for number in (0, 2, 4, 6)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "norm"),
    [*(("fpn", norm) for norm in ("FrozenBN", "BN", "GN", "")), ("c4", "FrozenBN"), ("retinanet", "FrozenBN")],
)
def test_a_training_pass_of_a_detector(kind, norm):
    """All convs of the backbone and what prepares predictions; what predicts stays out."""
    torch.manual_seed(0)
    depth = 50 if kind == "c4" else 18
    model = build(kind, depth, 2, norm)
    found = taking_part(model)
    prefix = "backbone" if kind == "c4" else "backbone.bottom_up"
    stages = (3, 4) if kind == "c4" else (3, 4, 5)
    convs = stage_convs(prefix, depth, stages) + (stage_convs("roi_heads", 50, (5,)) if kind == "c4" else [])
    shortcuts = [n for n in found if n.endswith("shortcut")]
    assert sorted(found) == sorted([*convs, *shortcuts, *HEADS[kind]])
    assert len(shortcuts) == 3
    for name in convs:
        assert found[name] == (f"{name}.norm" if norm else None)


def test_layer_norm_stays_out():
    """Detectron2's, written by hand: of constant channels it makes -mean / deviation."""
    net = build_net(Conv2d(3, 16, 3, norm=get_norm("LN", 16)), nn.ReLU())
    assert reasons(net)["0"]


def test_frozen_matches_are_named_as_the_reason():
    message = refused(build("fpn", 18, 5), DEFAULT_INCLUDE)
    assert "(16 that match are frozen)" in message
    assert "backbone.fpn_lateral2" in message


# --- one filter -----------------------------------------------------------------------------------------------------

FILTERS = 32  # get_norm("GN") has 32 groups


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN", "FrozenBN", "GN", ""])
@pytest.mark.parametrize("bias", [True, False])
def test_a_filter_whose_tensors_are_zero_gives_exactly_zero(norm, bias, train):
    torch.manual_seed(0)
    conv = Conv2d(3, FILTERS, 3, bias=bias, norm=get_norm(norm, FILTERS))
    model = nn.Sequential(conv).train(train)
    (layer,) = find_filter_layers(model, ["0"])
    with torch.no_grad():
        for tensor in [*layer.tensors().values(), *layer.running_statistics().values()]:
            tensor.uniform_(0.5, 2)
    expected = {"weight", *(["bias"] if bias else []), *(["norm.weight", "norm.bias"] if norm else [])}
    assert set(layer.tensors()) == expected
    assert all(len(tensor) == FILTERS for tensor in layer.tensors().values())
    rows = torch.tensor([0, 7, 31])
    before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    zero_rows_(layer.tensors().values(), rows)
    output = model(torch.randn(2, 3, 6, 6))
    others = [i for i in range(FILTERS) if i not in rows.tolist()]
    assert torch.count_nonzero(output[:, rows]) == 0
    assert (output[:, others] != 0).any()
    for name, tensor in layer.tensors().items():
        assert torch.count_nonzero(tensor[rows]) == 0
        assert torch.equal(tensor[others], before[name][others])


def test_zero_rows_clears_what_is_not_a_number():
    tensors = [torch.full((4, 2, 3, 3), float("nan")), torch.full((4,), float("inf"), dtype=torch.float16)]
    zero_rows_(tensors, torch.tensor([1, 3]))
    for tensor in tensors:
        assert torch.count_nonzero(tensor[[1, 3]]) == 0 and not torch.isfinite(tensor[[0, 2]]).any()
    zero_rows_(tensors, torch.tensor([], dtype=torch.int64))


def test_running_statistics():
    def statistics(norm):
        return find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1), norm), ["*"])[0].running_statistics()

    for norm in (nn.BatchNorm2d(4), FrozenBatchNorm2d(4), torchvision.ops.FrozenBatchNorm2d(4)):
        found = statistics(norm)
        assert list(found) == ["norm.running_mean", "norm.running_var"]
        assert found["norm.running_mean"] is norm.running_mean and found["norm.running_var"] is norm.running_var
    assert statistics(nn.BatchNorm2d(4, track_running_stats=False)) == {}
    assert statistics(nn.GroupNorm(2, 4)) == statistics(nn.ReLU()) == {}
