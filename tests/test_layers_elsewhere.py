"""Which convs of models that are not Detectron2's take part, and which are refused."""

import pytest
import torch
import torch.distributed as dist
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from found_layers import names, refused
from torch import nn
from torch.distributed import fsdp
from torch.nn.utils import prune

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers, zero_rows_

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


def test_patterns_that_match_nothing_beside_one_that_does():
    assert names(find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1)), ["nothing", "0", "[0-9]"])) == ["0"]


@pytest.mark.parametrize("patterns", ["*", [1], [None]])
def test_patterns_must_be_a_list_of_strings(patterns):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(UserError, match=r"REPR\.LAYERS\.INCLUDE must be a list of patterns"):
        find_filter_layers(model, patterns)
    with pytest.raises(UserError, match=r"REPR\.LAYERS\.EXCLUDE must be a list of patterns"):
        find_filter_layers(model, ["*"], patterns)


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
