"""Which convs take part in Detectron2's models, and what one filter of each is; others: test_layers_elsewhere.py."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from found_layers import names, refused
from torch import nn

from repr_det.method.layers import find_filter_layers, zero_rows_

DEFAULT_INCLUDE = ["backbone.bottom_up.res*.conv*", "backbone.res*.conv*", "roi_heads.res5.*.conv*"]
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
CONVS = {18: 2, 50: 3}


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


def test_layer_norm_is_refused_by_name():
    message = refused(build("fpn", 18, 0, "LN"), DEFAULT_INCLUDE)
    assert message.startswith(
        "REPR cannot drop filters of backbone.bottom_up.res2.0.conv1: its norm LayerNorm is none of"
    )
    assert "add 'backbone.bottom_up.res2.0.conv1' to REPR.LAYERS.EXCLUDE" in message


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convs_of_detectron2_stay_out(modulated):
    try:
        model = build(
            "fpn",
            50,
            2,
            MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, True, False, True],
            MODEL__RESNETS__DEFORM_MODULATED=modulated,
        )
    except ImportError as error:
        pytest.skip(f"Detectron2 without compiled operators: {str(error)[:60]}")
    expected = [
        name
        for name in stage_convs("backbone.bottom_up", 50, (3, 4, 5))
        if not (name.endswith("conv2") and (".res3." in name or ".res5." in name))
    ]
    assert names(find_filter_layers(model, DEFAULT_INCLUDE)) == expected


def test_offset_convs_stay_out():
    class DeformBlock(nn.Module):
        """The names and types of Detectron2's DeformBottleneckBlock, which its compiled operators need not run here."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = Conv2d(8, 4, 1, bias=False, norm=get_norm("BN", 4))
            self.conv2_offset = Conv2d(4, 18, 3)
            self.conv2 = torchvision.ops.DeformConv2d(4, 4, 3)
            self.conv3 = Conv2d(4, 8, 1, bias=False, norm=get_norm("BN", 8))

    model = nn.ModuleDict({"res3": nn.Sequential(DeformBlock())})
    assert names(find_filter_layers(model, ["res*.conv*"])) == ["res3.0.conv1", "res3.0.conv3"]


def test_frozen_matches_are_named_as_the_reason():
    message = refused(build("fpn", 18, 5), DEFAULT_INCLUDE)
    assert "(16 that match are frozen, see MODEL.BACKBONE.FREEZE_AT)" in message
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
        for tensor in [*layer.tensors().values(), *(layer.running_statistics() or ())]:
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


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
def test_only_moving_parameters_have_a_gradient_where_the_filter_is_zero(norm):
    """Everything else has a gradient of exactly 0 by itself, with nothing to mask it."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv2d(3, FILTERS, 3, bias=True, norm=get_norm(norm, FILTERS)))
    (layer,) = find_filter_layers(model, ["0"])
    rows = torch.tensor([2, 9])
    zero_rows_(layer.tensors().values(), rows)
    output = model(torch.randn(4, 3, 6, 6))
    (output * torch.randn_like(output)).sum().backward()
    moving = {id(p) for p in layer.moving_parameters()}
    assert all(p.requires_grad for p in layer.moving_parameters())
    for parameter in layer.parameters():
        if id(parameter) not in moving:
            assert parameter.grad is None or torch.count_nonzero(parameter.grad[rows]) == 0
    assert {id(p) for p in layer.parameters()} == {id(p) for p in model.parameters()}
    expected = {"BN": 2, "FrozenBN": 0, "GN": 4, "": 2}[norm]
    assert len(moving) == expected


def test_running_statistics():
    def statistics(norm):
        return find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1), norm), ["*"])[0].running_statistics()

    for norm in (nn.BatchNorm2d(4), FrozenBatchNorm2d(4), torchvision.ops.FrozenBatchNorm2d(4)):
        mean, variance = statistics(norm)
        assert mean is norm.running_mean and variance is norm.running_var
    assert statistics(nn.BatchNorm2d(4, track_running_stats=False)) is None
    assert statistics(nn.GroupNorm(2, 4)) is None and statistics(nn.ReLU()) is None
