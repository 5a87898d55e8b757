"""Candidates in models that are not Detectron2's; what takes part of them: test_proof.py, too."""

import pytest
import torch
import torch.distributed as dist
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from found_layers import names, refused
from torch import nn
from torch.distributed import fsdp
from traced_nets import build, reasons, verdicts

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers, zero_rows_
from repr_det.method.participants import Participants

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
    ("net", "name"),
    [
        (nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)), "0 (LazyConv2d)"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()), "1 (LazyBatchNorm2d)"),
    ],
)
def test_a_lazy_module_needs_a_pass_first(net, name):
    assert f"{name} has no weight before its first forward pass: run one" in refused(net)
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


def test_a_module_under_two_names_is_one_layer():
    conv = nn.Conv2d(4, 4, 1)
    assert names(find_filter_layers(nn.ModuleDict({"a": conv, "b": conv}), ["*"])) == ["a"]


def test_no_match_names_what_is_there():
    model = nn.ModuleDict({f"conv{i}": nn.Conv2d(3, 4, 1) for i in range(20)})
    message = refused(model, ["backbone.*"])
    assert message.startswith("layers= ['backbone.*'] matches no trainable Conv2d")
    assert "conv0, conv1" in message and "and 8 more" in message
    assert "layers= ['conv*'] less exclude= ['conv*'] matches no trainable Conv2d" in refused(
        model, ["conv*"], ["conv*"]
    )
    assert "the closest trainable ones: none" in refused(nn.Linear(3, 3))
    assert "matches no trainable Conv2d" in refused(model, [])


def test_patterns_that_match_nothing_beside_one_that_does():
    assert names(find_filter_layers(nn.Sequential(nn.Conv2d(3, 4, 1)), ["nothing", "0", "[0-9]"])) == ["0"]


@pytest.mark.parametrize("patterns", ["*", [1], [None]])
def test_patterns_must_be_a_list_of_strings(patterns):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(UserError, match=r"^layers= must be a list of patterns"):
        find_filter_layers(model, patterns)
    with pytest.raises(UserError, match=r"^exclude= must be a list of patterns"):
        find_filter_layers(model, ["*"], patterns)


# --- timm -----------------------------------------------------------------------------------------------------------

# Convs that take part, of all, and the norms behind them. EfficientNet's gates stay out; its norms hold their
# activation.
TIMM = {"resnet18": (20, 20, {"BatchNorm2d"}), "efficientnet_b0": (65, 81, {"BatchNormAct2d", "NoneType"})}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    takes_part, convs, norms = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    participants = Participants(find_filter_layers(model, ["*"]), model)
    model(torch.randn(2, 3, 32, 32))
    layers = participants.agreed()
    assert (len(layers), len(participants.candidates)) == (takes_part, convs)
    assert {type(layer.norm).__name__ for layer in layers} == norms
    outputs = {}
    for layer in layers:
        if layer.norm is not None:
            nn.init.normal_(layer.norm.bias)
        zero_rows_(layer.tensors().values(), torch.tensor([0, 3]))
        layer.output_module().register_forward_hook(lambda _, __, out, name=layer.name: outputs.update({name: out}))
    model(torch.randn(2, 3, 32, 32))
    assert outputs.keys() == {layer.name for layer in layers}
    for output in outputs.values():
        assert output[:, [0, 3]].count_nonzero() == 0 and output.count_nonzero() > 0


def test_norms_of_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    layers = timm.layers
    stay_out = [layers.LayerNorm2d(16), layers.LayerNormAct2d(16), layers.BatchNormAct2d(16, act_layer=nn.Sigmoid)]
    for norm in stay_out:
        assert reasons(build(nn.Conv2d(3, 16, 3), norm))["0"], norm
    take_part = [layers.BatchNormAct2d(16, act_layer=act) for act in (nn.ReLU, nn.SiLU, nn.Hardswish, nn.PReLU)]
    for norm in (*take_part, layers.GroupNormAct(16, num_groups=8), layers.FrozenBatchNormAct2d(16)):
        found = verdicts(build(nn.Conv2d(3, 16, 3), norm))["0"]
        assert (found.reason, found.norm) == ("", "1"), norm
    standardised = build(layers.StdConv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.ReLU())
    assert "its weight goes through" in reasons(standardised)["0"]
