"""Which convs take part in Detectron2's and other models, and what one filter of each is."""

import pytest
import torch
import torch.distributed as dist
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from torch import nn
from torch.distributed import fsdp
from torch.nn.utils import prune

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers, zero_rows_

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


def names(layers: list[FilterLayer]) -> list[str]:
    return [layer.name for layer in layers]


def refused(model: nn.Module, include=("*",), exclude=(), **keys) -> str:
    with pytest.raises(UserError) as error:
        find_filter_layers(model, list(include), list(exclude), **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


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


# --- other models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm_layer", "kind"), [(nn.BatchNorm2d, "batch"), (torchvision.ops.FrozenBatchNorm2d, "frozen")]
)
@pytest.mark.parametrize(("depth", "blocks", "convs"), [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3)])
def test_torchvision_resnets(depth, blocks, convs, norm_layer, kind):
    model = getattr(torchvision.models, depth)(norm_layer=norm_layer)
    layers = find_filter_layers(model, ["layer*.conv*"])
    assert names(layers) == [
        f"layer{s + 1}.{b}.conv{c + 1}" for s in range(4) for b in range(blocks[s]) for c in range(convs)
    ]
    for layer in layers:
        assert layer.norm is model.get_submodule(layer.name.replace("conv", "bn")) and layer.kind == kind
        assert layer.output_module() is layer.norm


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (lambda: nn.BatchNorm2d(8), "batch"),
        (lambda: nn.SyncBatchNorm(8), "batch"),
        (lambda: nn.GroupNorm(2, 8), "group"),
        (lambda: FrozenBatchNorm2d(8), "frozen"),
        (lambda: torchvision.ops.FrozenBatchNorm2d(8), "frozen"),
        (lambda: nn.ReLU(), "none"),
        (lambda: nn.Identity(), "none"),
        (lambda: nn.BatchNorm2d(4), "none"),  # that of something else
    ],
)
@pytest.mark.parametrize("conv", [nn.Conv2d, Conv2d])
def test_sequential(norm, kind, conv):
    model = nn.Sequential(conv(3, 8, 3), norm(), nn.ReLU(), conv(8, 4, 1))
    first, last = find_filter_layers(model, ["*"])
    assert (first.name, first.kind, last.name, last.kind) == ("0", kind, "3", "none")
    assert first.norm is (None if kind == "none" else model[1]) and last.norm is None
    assert first.output_module() is (model[0] if kind == "none" else model[1])


def test_norms_that_the_caller_names():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(3, 4, 1)
            self.other = nn.BatchNorm2d(4)

    model = Odd()
    (layer,) = find_filter_layers(model, ["conv"], norms={"conv": model.b})
    assert layer.norm is model.b
    (layer,) = find_filter_layers(model, ["conv"], norms={"conv": None})
    assert layer.norm is None and layer.kind == "none"
    assert find_filter_layers(model, ["conv"])[0].norm is model.other


def test_model_that_is_one_conv_and_grouped_convs():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8))
    (layer,) = find_filter_layers(model, ["0"])
    assert layer.weight.shape == (8, 1, 3, 3) and layer.num_filters == 8


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (nn.InstanceNorm2d(8, affine=True), "InstanceNorm2d"),
        (nn.LayerNorm([8, 4, 4]), "LayerNorm"),
        (nn.LocalResponseNorm(2), "LocalResponseNorm"),
    ],
)
def test_norms_that_cannot_be_handled_are_refused_by_name(norm, name):
    # With gamma and beta of one's own, or none: a zero row would not make the channel zero behind them.
    message = refused(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    assert message.startswith(f"REPR cannot drop filters of 0: its norm {name} is none of")
    assert find_filter_layers(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 1)), ["*"], ["0"])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8, affine=False)])
def test_norms_without_a_weight_are_refused(norm):
    # Behind them a zero row is -mean / sigma, and the gradient of the row is not zero either.
    message = refused(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    assert f"filters of 0: its norm {type(norm).__name__} has no weight" in message


def reparametrised() -> dict[str, nn.Conv2d]:
    pruned = nn.Conv2d(3, 8, 3)
    prune.random_unstructured(pruned, "weight", 0.5)
    return {
        "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        "old weight norm": nn.utils.weight_norm(nn.Conv2d(3, 8, 3)),
        "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)),
        "old spectral norm": nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)),
        "pruning": pruned,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight norm", "old weight norm", "spectral norm", "old spectral norm", "pruning"])
def test_reparametrised_weights_are_refused_by_name(kind):
    conv = reparametrised()[kind]
    assert "filters of a: its weight is re-parametrised" in refused(nn.ModuleDict({"a": conv, "b": nn.Conv2d(8, 8, 3)}))
    several = nn.ModuleDict({name: reparametrised()[kind] for name in "abc"})
    assert "filters of a: its weight is re-parametrised" in refused(several)
    for parameter in conv.parameters():
        parameter.requires_grad_(False)
    assert names(find_filter_layers(nn.ModuleDict({"a": conv, "b": nn.Conv2d(8, 8, 3)}), ["*"])) == ["b"]


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)), "0 (LazyConv2d)"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()), "1 (LazyBatchNorm2d)"),
    ],
)
def test_a_lazy_module_needs_a_pass_first(net, name):
    assert f"REPR: {name} has no weight before its first forward pass: run one" in refused(net)
    net(torch.randn(2, 3, 8, 8))
    (layer,) = find_filter_layers(net, ["*"])
    assert (layer.num_filters, layer.kind) == (8, "batch")


@pytest.mark.parametrize("how", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_models_are_refused_by_name(how, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        if how == "fully_shard":
            fsdp.fully_shard(net)
        else:
            net = fsdp.FullyShardedDataParallel(net, device_id=torch.device("cpu"))
        assert "are sharded over processes (FSDP)" in refused(net)
    finally:
        dist.destroy_process_group()


def test_shared_weights_are_refused_by_name():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    for include in (["*"], ["0"], ["2"]):  # also where only one of them takes part
        message = refused(model, include)
        assert "shares its weight" in message and "0" in message and "2" in message
    model[2] = nn.Conv2d(4, 4, 1)
    assert names(find_filter_layers(model, ["*"])) == ["0", "2"]


def test_shared_norms_are_refused_by_name():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "n": norm})
    assert "shares its weight or norm with a" in refused(model, norms={"a": norm, "b": norm})
    shared = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(4, 4, 1), norm), "b": nn.Sequential(nn.Conv2d(4, 4, 1), norm)})
    assert "shares its weight or norm with a.0" in refused(shared)


def test_a_module_under_two_names_is_one_layer():
    conv = nn.Conv2d(4, 4, 1)
    assert names(find_filter_layers(nn.ModuleDict({"a": conv, "b": conv}), ["*"])) == ["a"]


def test_no_match_names_what_is_there():
    model = nn.ModuleDict({f"conv{i}": nn.Conv2d(3, 4, 1) for i in range(20)})
    message = refused(model, ["backbone.*"])
    assert "REPR.LAYERS.INCLUDE ['backbone.*'] less EXCLUDE [] matches no trainable Conv2d" in message
    assert "conv0, conv1" in message and "and 8 more" in message
    assert "EXCLUDE ['conv*'] matches no trainable Conv2d" in refused(model, ["conv*"], ["conv*"])
    assert "trainable here: none" in refused(nn.Linear(3, 3))
    assert "matches no trainable Conv2d" in refused(model, [])


def test_frozen_matches_are_named_as_the_reason():
    message = refused(build("fpn", 18, 5), DEFAULT_INCLUDE)
    assert "(16 that match are frozen, see MODEL.BACKBONE.FREEZE_AT)" in message
    assert "backbone.fpn_lateral2" in message


def test_patterns_that_match_nothing_beside_one_that_does():
    assert names(find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1)), ["nothing", "0", "[0-9]"])) == ["0"]


@pytest.mark.parametrize("patterns", ["*", [1], [None]])
def test_patterns_must_be_a_list_of_strings(patterns):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(UserError, match=r"REPR\.LAYERS\.INCLUDE must be a list of patterns"):
        find_filter_layers(model, patterns)
    with pytest.raises(UserError, match=r"REPR\.LAYERS\.EXCLUDE must be a list of patterns"):
        find_filter_layers(model, ["*"], patterns)


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


# --- timm -----------------------------------------------------------------------------------------------------------

TIMM = {  # model -> patterns and how many convs take part, behind which norms
    # A ResNet: two convs a block, four blocks of two, a shortcut's conv in three of the stages, a stem.
    "resnet18": (["*"], [], 8 * 2 + 3 + 1, {"BatchNorm2d"}),
    # A ConvNet whose norms hold their activation: 1 block of 2 convs and 15 of 3, stem and head; squeeze-and-excitation
    # puts out factors, not features.
    "efficientnet_b0": (["*"], [], 1 * 2 + 15 * 3 + 2, {"BatchNormAct2d"}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    include, exclude, convs, norms = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    layers = find_filter_layers(model, include, exclude)
    assert len(layers) == convs and {type(layer.norm).__name__ for layer in layers} == norms
    outputs = {}
    for layer in layers:
        with torch.no_grad():
            layer.norm.bias.normal_()
        zero_rows_(layer.tensors().values(), torch.tensor([0, 3]))
        layer.output_module().register_forward_hook(lambda _, __, out, name=layer.name: outputs.update({name: out}))
    model(torch.randn(2, 3, 32, 32))
    assert outputs.keys() == {layer.name for layer in layers}
    for output in outputs.values():
        assert output[:, [0, 3]].count_nonzero() == 0 and output.count_nonzero() > 0


def test_norms_of_timm_that_cannot_be_handled_are_refused_by_name():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    layers = timm.layers
    for norm in (layers.LayerNorm2d(8), layers.FrozenBatchNormAct2d(8), layers.LayerNormAct2d(8)):
        assert f"its norm {type(norm).__name__} is none of" in refused(nn.Sequential(nn.Conv2d(3, 8, 3), norm))
    # A dropped channel would put out sigmoid(0) = 0.5.
    loud = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, act_layer=nn.Sigmoid))
    assert "the activation Sigmoid in its norm BatchNormAct2d does not map 0 to 0" in refused(loud)
    for act in (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.PReLU):
        (layer,) = find_filter_layers(nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, act_layer=act)), ["*"])
        assert layer.kind == "batch"
    (layer,) = find_filter_layers(nn.Sequential(nn.Conv2d(3, 8, 3), layers.GroupNormAct(8, num_groups=2)), ["*"])
    assert layer.kind == "group"
