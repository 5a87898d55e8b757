"""Candidates in Detectron2's models, those that a training pass lets take part, and what one filter of each is."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from traced_nets import names, refused

from repr_det.method.layers import find_filter_layers, zero_rows_
from repr_det.method.participants import Participants

DEFAULT_INCLUDE = ["backbone.bottom_up.res*.conv*", "backbone.res*.conv*", "roi_heads.res5.*.conv*"]
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
}


def build(kind: str, depth: int, freeze_at: int, norm: str = "FrozenBN", device: str = "meta", **keys) -> nn.Module:
    """Faster R-CNN or RetinaNet with random weights; heads as small as they go, the backbone of full width."""
    cfg = get_cfg()
    if kind == "retinanet":
        cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CLASSES = 16, 2
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = device, norm, 16
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.BACKBONE.FREEZE_AT = depth, freeze_at
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    for key, value in ((FPN if kind == "fpn" else {}) | {k.replace("__", "."): v for k, v in keys.items()}).items():
        cfg.merge_from_list([key, value])
    with torch.device(device):
        return build_model(cfg)


def stage_convs(prefix: str, depth: int, *stages: int) -> list[str]:
    return [
        f"{prefix}.res{stage}.{block}.conv{conv}"
        for stage in stages
        for block in range(BLOCKS[depth][stage - 2])
        for conv in range(1, 3 if depth == 18 else 4)
    ]


# --- Detectron2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "depth", "freeze_at", "expected", "filters"),
    [
        # 22,656 filters in an R50, of which 3 x (64 + 64 + 256) are in res2.
        ("fpn", 50, 0, stage_convs("backbone.bottom_up", 50, 2, 3, 4, 5), 22656),
        ("fpn", 50, 3, stage_convs("backbone.bottom_up", 50, 4, 5), 22656 - 1152 - 4 * (128 + 128 + 512)),
        ("fpn", 18, 2, stage_convs("backbone.bottom_up", 18, 3, 4, 5), 4 * (128 + 256 + 512)),
        ("c4", 50, 2, stage_convs("backbone", 50, 3, 4) + stage_convs("roi_heads", 50, 5), 22656 - 1152),
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
    model = build("fpn", 18, 0, norm, MODEL__FPN__NORM="GN")
    layers = find_filter_layers(model, [*DEFAULT_INCLUDE, "backbone.fpn_*"], ["*.res5.*", "*_output5"])
    # In the order of the model: FPN registers its own convs before the backbone that they sit on.
    assert names(layers) == [name for name, _ in model.named_modules() if name in names(layers)]
    kinds = {layer.name: layer.kind for layer in layers}
    fpn = {kinds.pop(name) for name in list(kinds) if "fpn" in name}
    assert fpn == {"group"} and len(layers) == 12 + 7
    assert set(kinds.values()) == {{"GN": "group", "FrozenBN": "frozen"}.get(norm, "batch")}


def test_frozen_matches_are_named_as_the_reason():
    message = refused(build("fpn", 18, 5), DEFAULT_INCLUDE)
    assert "(16 that match are frozen)" in message and "backbone.fpn_lateral2" in message


FPN_CONVS = [f"backbone.fpn_{kind}{level}" for level in (3, 4, 5) for kind in ("lateral", "output")]
RPN = ["proposal_generator.rpn_head.conv"]
HEADS = {
    "fpn": [*RPN, *FPN_CONVS, "backbone.fpn_lateral2", "backbone.fpn_output2"],
    "c4": [*RPN, *stage_convs("roi_heads", 50, 5)],
    "retinanet": [
        *(*FPN_CONVS, "backbone.top_block.p6", "backbone.top_block.p7"),
        *(f"head.{part}_subnet.{number}" for part in ("cls", "bbox") for number in (0, 2, 4, 6)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "norm"), [("fpn", "FrozenBN"), ("fpn", "GN"), ("fpn", ""), ("c4", "FrozenBN"), ("retinanet", "BN")]
)
def test_a_training_pass_of_a_detector(kind, norm):
    """All convs of the backbone and what prepares predictions; what predicts stays out."""
    torch.manual_seed(0)
    depth = 50 if kind == "c4" else 18
    model = build(kind, depth, 2, norm, "cpu")
    boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [40, 30, 110, 90]]))
    instances = Instances((96, 128), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
    participants = Participants(find_filter_layers(model, ["*"]), model)
    with EventStorage(0):
        model.train()([dict(image=torch.randint(0, 255, (3, 96, 128)).float(), instances=instances) for _ in range(2)])
    found = {layer.name: layer.norm_name for layer in participants.agreed()}
    convs = stage_convs(*(("backbone", 50, 3, 4) if kind == "c4" else ("backbone.bottom_up", 18, 3, 4, 5)))
    shortcuts = [n for n in found if n.endswith("shortcut")]
    assert sorted(found) == sorted([*convs, *shortcuts, *HEADS[kind]]) and len(shortcuts) == 3
    assert all(found[name] == (f"{name}.norm" if norm else None) for name in convs)


# --- one filter -----------------------------------------------------------------------------------------------------

FILTERS = 32  # get_norm("GN") has 32 groups


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("norm", "bias"), [("BN", False), ("naiveSyncBN", True), ("FrozenBN", False), ("GN", True), ("", True), ("", False)]
)
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
    rows = torch.tensor([0, 7, 31])
    before = {name: tensor.detach().clone().index_fill(0, rows, 0) for name, tensor in layer.tensors().items()}
    zero_rows_(layer.tensors().values(), rows)
    output = model(torch.randn(2, 3, 6, 6))
    assert output.abs().amax((0, 2, 3)).count_nonzero() == FILTERS - 3 and not output[:, rows].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.tensors().items())


def test_zero_rows_clears_what_is_not_a_number():
    tensors = [torch.full((4, 2, 3, 3), float("nan")), torch.full((4,), float("inf"), dtype=torch.float16)]
    zero_rows_(tensors, torch.tensor([1, 3]))
    for tensor in tensors:
        assert torch.count_nonzero(tensor[[1, 3]]) == 0 and not torch.isfinite(tensor[[0, 2]]).any()
    zero_rows_(tensors, torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)])
def test_norms_without_running_statistics(norm):
    assert find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1), norm), ["*"])[0].running_statistics() == {}
