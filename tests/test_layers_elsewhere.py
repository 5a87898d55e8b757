"""Candidates in models that are not Detectron2's; what takes part of them: test_proof.py, too."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.distributed import fsdp
from traced_nets import build, names, reasons, refused, verdicts

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.network.norms import epsilon, norm_kind


def test_torchvision_resnets():
    model = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    layers = find_filter_layers(model, ["layer*.conv*"])
    blocks = [(stage, block) for stage, number in enumerate((3, 4, 6, 3), 1) for block in range(number)]
    assert names(layers) == [f"layer{stage}.{block}.conv{conv}" for stage, block in blocks for conv in (1, 2, 3)]
    for layer in layers:
        assert layer.norm is model.get_submodule(layer.name.replace("conv", "bn")) and layer.kind == "frozen"
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


def test_a_module_under_two_names_is_one_layer_and_groups_are_of_one():
    conv = nn.Conv2d(4, 8, 3, groups=4)
    (layer,) = find_filter_layers(nn.ModuleDict({"a": conv, "b": conv}), ["*"])
    assert (layer.name, layer.num_filters, layer.weight.shape) == ("a", 8, (8, 1, 3, 3))


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


def test_patterns_beside_one_that_matches_and_such_as_are_no_list_of_strings():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert names(find_filter_layers(model, ["nothing", "0", "[0-9]"])) == ["0"]
    for key, patterns in (("layers", "*"), ("layers", [1]), ("exclude", "*"), ("exclude", [None])):
        with pytest.raises(UserError, match=f"^{key}= must be a list of patterns"):
            find_filter_layers(model, **{"include": ["*"], key.replace("layers", "include"): patterns})


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


def test_frozen_norms_of_transformers():
    """By what they do: each has a class of its own, and an eps that it does not tell."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sources = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    found = {}
    for file in sources:
        for name in re.findall(r"^class (\w+FrozenBatchNorm2d)\(", file.read_text(), re.M):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            found[name] = getattr(module, name)(16)
    assert len(found) > 10
    for name, norm in found.items():
        verdict = verdicts(build(nn.Conv2d(3, 16, 3), norm, nn.ReLU()))["0"]
        assert (verdict.reason, verdict.norm, verdict.rectified, norm_kind(norm)) == ("", "1", True, "frozen"), name
        assert epsilon(norm) == pytest.approx(1e-5), name
