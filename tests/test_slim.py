"""The slim sub-network against the masked one: stock Detectron2 forward passes over parameters that hold zeros."""

import copy

import pytest
import torch
import torch.distributed as dist
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.utils.events import EventStorage
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from repr_det.method.layers import BATCH, GROUP, find_filter_layers, zero_rows_
from repr_det.method.slim import SlimNetwork

NORMS = ["BN", "FrozenBN", "naiveSyncBN", "GN", ""]
# Double precision, so that nothing but rounding of the last digits can differ (BN on few values magnifies it).
RTOL = 1e-10


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Affine parameters and statistics of every norm that a mistake in slicing would show in."""
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            values = getattr(module, name, None)
            if values is not None and values.dim() == 1:
                low = 0.0 if name.endswith(("bias", "mean")) else 0.5
                values.data.copy_(low + 0.5 * torch.rand(len(values), generator=generator))


def resnet(depth: int, norm: str, seed: int = 0) -> ResNet:
    """R18- or R50-like in double precision: two stages of two blocks, the first with a projection shortcut."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    stem = BasicStem(3, 32, norm=norm)
    if depth == 18:
        block, options = BasicBlock, {}
    else:
        block, options = BottleneckBlock, {"bottleneck_channels": 32, "stride_in_1x1": True}
    stages, channels = [], 32
    for number in range(2):
        stages.append(
            ResNet.make_stage(
                block,
                2,
                stride_per_block=[1 + number, 1],
                in_channels=channels,
                out_channels=64 * (1 + number),
                norm=norm,
                **options,
            )
        )
        channels = 64 * (1 + number)
    model = ResNet(stem, stages, out_features=["res2", "res3"]).double()
    randomise_norms(model, generator)
    return model


def drop(model: nn.Module, patterns: list[str], seed: int = 1, share: float = 0.3):
    """Layers and masks with ``share`` of each dropped; of the first layers none, one, all but one and half."""
    generator = torch.Generator().manual_seed(seed)
    layers, masks = find_filter_layers(model, patterns), {}
    for number, layer in enumerate(layers):
        size = layer.num_filters
        count = [0, 1, size - 1, size // 2][number] if number < 4 else round(share * size)
        masks[layer.name] = torch.zeros(size, dtype=torch.bool)
        masks[layer.name][torch.randperm(size, generator=generator)[:count]] = True
        zero_rows_(layer.tensors().values(), masks[layer.name].nonzero().flatten())
    return layers, masks


def step(model: nn.Module, x: torch.Tensor, layers, masks) -> list[torch.Tensor]:
    """One SGD step with the gradients of dropped rows zero, as RePrScheme holds them; returns the outputs."""
    outputs = model(x)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o) for o in outputs]
    model.zero_grad()
    sum(((o * w).mean() + (o * o).mean()) for o, w in zip(outputs, weights, strict=True)).backward()
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.grad is not None:
                zero_rows_([parameter.grad], masks[layer.name].nonzero().flatten())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return [o.detach() for o in outputs]


def assert_same(found: torch.Tensor, wanted: torch.Tensor, what: str, rtol: float = RTOL) -> None:
    difference = (found.double() - wanted.double()).abs().max().item()
    assert difference <= rtol * max(wanted.abs().max().item(), 1e-3), what


def assert_same_training(masked: nn.Module, slim: nn.Module, layers, masks, steps=2, size=(2, 3, 48, 32), multiple=8):
    """Outputs, all gradients and parameters, and the statistics of kept channels after every step."""
    mine = {layer.name: layer for layer in find_filter_layers(slim, list(masks))}
    network = SlimNetwork(slim, list(mine.values()), masks, multiple=multiple)
    network.install()
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(*size, generator=generator, dtype=next(masked.parameters()).dtype)
        wanted, found = step(masked, x, layers, masks), step(slim, x, mine.values(), masks)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b, "output")
        for (name, a), b in zip(slim.named_parameters(), masked.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                assert_same(a.grad, b.grad, f"gradient of {name}")
                assert_same(a, b, name)
    kept = {f"{layer.name}.norm": ~masks[layer.name] for layer in layers}
    for (name, a), b in zip(slim.named_buffers(), masked.buffers(), strict=True):
        rows = kept.get(name.rpartition(".")[0]) if a.dim() else None
        assert_same(a if rows is None else a[rows], b if rows is None else b[rows], name)
    network.remove()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_two_steps_are_those_of_the_masked_network(depth, norm, multiple):
    masked = resnet(depth, norm)
    layers, masks = drop(masked, ["res*.conv*"])
    assert_same_training(masked, copy.deepcopy(masked), layers, masks, multiple=multiple)


@pytest.mark.parametrize("patterns", [["*conv2"], ["*conv1", "*conv3"], ["*shortcut", "*conv3"], ["stem*", "*res3*"]])
def test_any_choice_of_layers(patterns):
    masked = resnet(50, "BN")
    layers, masks = drop(masked, patterns)
    assert_same_training(masked, copy.deepcopy(masked), layers, masks)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
def test_a_gradient_of_a_gradient_is_that_of_the_masked_network(depth, norm):
    """Gradient penalties, Hessian-vector products."""
    masked = resnet(depth, norm)
    layers, masks = drop(masked, ["res*.conv*"])
    slim = copy.deepcopy(masked)
    mine = find_filter_layers(slim, ["res*.conv*"])

    def penalty(model: nn.Module, of: list) -> torch.Tensor:
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
        (gradient,) = torch.autograd.grad((model(x)["res3"] ** 2).mean(), x, create_graph=True)
        (gradient**2).sum().backward()
        for layer in of:
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    zero_rows_([parameter.grad], masks[layer.name].nonzero().flatten())
        return gradient.detach()

    wanted = penalty(masked, layers)
    with SlimNetwork(slim, mine, masks):
        assert_same(penalty(slim, mine), wanted, "gradient of the input")
    largest = 0.0
    for (name, a), b in zip(slim.named_parameters(), masked.parameters(), strict=True):
        if b.grad is not None:
            assert_same(torch.zeros_like(a) if a.grad is None else a.grad, b.grad, name)
            largest = max(largest, b.grad.abs().max().item())
    assert largest > 1e-6


def _dual(net, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize(
    "transform",
    [
        _dual,
        lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
        lambda net, x: torch.func.grad(lambda a: (net(a) ** 2).sum())(x),
        lambda net, x: torch.vmap(net)(x[None]),
    ],
    ids=["forward mode", "jvp", "grad", "vmap"],
)
def test_transforms_that_know_torch_operations_alone_see_the_masked_network(transform):
    net = resnet(50, "FrozenBN")
    layers, masks = drop(net, ["res*.conv*"])
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()

    def model(images):
        return net(images)["res3"]

    wanted = transform(model, x)
    with SlimNetwork(net, layers, masks) as network:
        model(x)
        assert network.count()[0].operations > 0  # it is slim otherwise
        assert torch.equal(transform(model, x), wanted)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
def test_evaluation_mode(norm):
    model = resnet(50, norm).eval()
    layers, masks = drop(model, ["res*.conv*"])
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        wanted = model(x)
        with SlimNetwork(model, layers, masks):
            found = model(x)
    for name in wanted:
        assert_same(found[name], wanted[name], name)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_single_precision_agrees_to_five_digits(norm):
    model = resnet(50, norm).float().eval()
    layers, masks = drop(model, ["res*.conv*"])
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    wanted = model(x)["res3"]
    with SlimNetwork(model, layers, masks):
        assert_same(model(x)["res3"], wanted, "output", rtol=1e-5)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_autocast(norm):
    masked = resnet(50, norm).float()
    layers, masks = drop(masked, ["res*.conv*"])
    slim = copy.deepcopy(masked)
    mine = find_filter_layers(slim, ["res*.conv*"])
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with SlimNetwork(slim, mine, masks), torch.autocast("cpu", torch.bfloat16):
        wanted, found = step(masked, x, layers, masks), step(slim, x, mine, masks)
    assert [o.dtype for o in found] == [o.dtype for o in wanted]
    # bfloat16 has 8 bits: two ways to the same number differ in the last ones, and layers add up.
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()
    for (name, a), b in zip(slim.named_parameters(), masked.parameters(), strict=True):
        if a.grad is not None:
            assert a.grad.dtype == torch.float32, name
            assert (a.grad - b.grad).norm() <= 0.15 * b.grad.norm() + 1e-4, name


@pytest.mark.parametrize("multiple", [1, 8])
def test_gradients_of_dropped_filters_and_of_their_consumers_are_exactly_zero(multiple):
    model = resnet(50, "BN")
    layers, masks = drop(model, ["res*.conv*"])
    with SlimNetwork(model, layers, masks, multiple=multiple):
        x = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(2)).double()
        sum(o.sin().sum() for o in model(x).values()).backward()
    for layer in layers:
        for parameter in layer.parameters():
            assert not parameter.grad[masks[layer.name]].count_nonzero(), layer.name
    for stem in ("res2.1.", "res3.0.", "res3.1."):
        for producer, consumer in (("conv1", "conv2"), ("conv2", "conv3")):
            weight = model.get_submodule(stem + consumer).weight
            assert not weight.grad[:, masks[stem + producer]].count_nonzero()
            assert weight.grad[:, ~masks[stem + producer]].count_nonzero()


def test_sync_norm_of_detectron2_with_its_own_maths(monkeypatch, tmp_path):
    """naiveSyncBN takes its many-process path: a gloo group of one process, and a world size of 2 for the norm."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr("detectron2.layers.batch_norm.comm.get_world_size", lambda: 2)
        masked = resnet(50, "naiveSyncBN")
        layers, masks = drop(masked, ["res*.conv*"])
        assert_same_training(masked, copy.deepcopy(masked), layers, masks)
    finally:
        dist.destroy_process_group()


def test_grouped_convs_stay_masked_and_the_conv_before_them_fills_in_zeros():
    torch.manual_seed(0)
    masked = nn.Sequential(
        BottleneckBlock(16, 32, bottleneck_channels=32, num_groups=4, norm="BN"),
        BottleneckBlock(32, 32, bottleneck_channels=32, num_groups=32, norm="BN"),
    ).double()
    layers, masks = drop(masked, ["*conv*"])
    assert_same_training(masked, copy.deepcopy(masked), layers, masks, size=(2, 16, 9, 7))


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=2, dilation=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.Sigmoid(),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Flatten(),
    ).double()


def test_plain_convs_fill_in_zeros():
    masked = plain_net()
    layers, masks = drop(masked, ["*"])
    assert_same_training(masked, copy.deepcopy(masked), layers, masks, size=(3, 3, 16, 16), multiple=1)


def test_a_whole_detector_with_fpn_convs(tiny_cfg):
    cfg = tiny_cfg("MODEL.RESNETS.NORM", "BN")
    torch.manual_seed(0)
    masked = build_model(cfg).double()
    _, masks = drop(masked, ["backbone.bottom_up.res*.conv*", "backbone.fpn_*"])
    slim = copy.deepcopy(masked)
    batch = [dict(image=torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(4)))] * 2
    for model in (masked, slim):
        model.train()
    features = {}
    with EventStorage(), SlimNetwork(slim, find_filter_layers(slim, list(masks)), masks):
        for key, model in (("masked", masked), ("slim", slim)):
            features[key] = model.backbone(model.preprocess_image(batch).tensor.double())
    for name, wanted in features["masked"].items():
        assert_same(features["slim"][name], wanted, name)


def test_dropped_channels_are_not_computed():
    """FLOPs of a bottleneck, forward and backward, against the count by hand."""
    block = BottleneckBlock(64, 64, bottleneck_channels=32, norm="FrozenBN")
    layers = find_filter_layers(block, ["conv*"])
    masks = {x.name: torch.arange(x.num_filters) < x.num_filters // 4 for x in layers}
    for layer in layers:
        zero_rows_(layer.tensors().values(), masks[layer.name].nonzero().flatten())
    x = torch.randn(2, 64, 10, 10, requires_grad=True)
    counts = []
    for width, outputs, multiple in ((32, 64, None), (24, 48, 1), (24, 48, 8), (32, 48, 16)):
        slim = SlimNetwork(block, layers, masks, multiple=multiple or 1)
        if multiple:
            slim.install()
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        slim.remove()
        by_hand = 64 * width + 9 * width * width + width * outputs
        counts.append((counter.get_total_flops(), 3 * 2 * 2 * 100 * by_hand))
    for found, wanted in counts:
        assert found == wanted


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_hooks_on_convs_norms_and_blocks_fire_once(norm):
    model = resnet(50, norm)
    layers, masks = drop(model, ["res*.conv*"], share=0.5)
    x = torch.randn(1, 3, 32, 32).double()
    wanted = model(x)["res3"]
    calls = []
    for name, module in model.named_modules():
        if name.startswith("res3"):
            module.register_forward_hook(lambda m, i, o, name=name: calls.append((name, tuple(o.shape))))
    model.eval()(x)
    dense, calls[:] = dict(calls), []
    model.train(norm == "BN")
    with SlimNetwork(model, layers, masks):
        found = model(x)["res3"]
    assert [name for name, _ in calls].count("res3.0.conv2.norm") == 1
    assert len(calls) == len(dense) and dict(calls).keys() == dense.keys()
    slimmed = {name: shape for name, shape in calls if shape != dense[name]}
    assert slimmed == {
        f"res3.{i}.conv{j}{suffix}": (1, dense[f"res3.{i}.conv{j}"][1] // 2, *dense[f"res3.{i}.conv{j}"][2:])
        for i in (0, 1)
        for j in (1, 2, 3)
        for suffix in ("", ".norm")
    }
    assert_same(found, wanted, "output")


def test_install_and_remove_are_idempotent_and_leave_no_trace():
    model = resnet(18, "BN")
    layers, masks = drop(model, ["res*.conv*"])
    keys = list(model.state_dict())
    traces = {name: set(module.__dict__) for name, module in model.named_modules()}
    slim = SlimNetwork(model, layers, masks)
    slim.remove()
    for _ in range(2):
        slim.install()
        slim.install()
        assert slim.installed and model.res3[1]._compiled_call_impl is not None
        assert list(model.state_dict()) == keys
        slim.remove()
        slim.remove()
        assert not slim.installed
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == traces


def test_nothing_dropped_replaces_nothing():
    model = resnet(18, "BN")
    layers = find_filter_layers(model, ["res*.conv*"])
    masks = {layer.name: torch.zeros(layer.num_filters, dtype=torch.bool) for layer in layers}
    SlimNetwork(model, layers, masks).install()
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())


def test_foreign_forward_replacements_are_left_alone():
    """A wrapper that checkpoints a block or a conv's forward keeps working, and the numbers stay."""
    masked = resnet(50, "BN")
    layers, masks = drop(masked, ["res*.conv*"])
    slim = copy.deepcopy(masked)
    block, conv = slim.res3[0], slim.res3[1].conv2
    block.forward = foreign_block = lambda x: BottleneckBlock.forward(block, x)
    conv.forward = foreign_conv = lambda x: type(conv).forward(conv, x)
    assert_same_training(masked, slim, layers, masks)
    assert block.forward is foreign_block and conv.forward is foreign_conv


@pytest.mark.parametrize("mask", [torch.ones(32, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)])
def test_impossible_masks_are_refused(mask):
    model = resnet(50, "BN")
    layers = find_filter_layers(model, ["res3.0.conv1"])
    with pytest.raises(ValueError, match=r"res3\.0\.conv1 must keep at least one of 32 filters"):
        SlimNetwork(model, layers, {layers[0].name: mask})


def test_the_norms_under_test_are_what_their_names_say():
    kinds = {norm: find_filter_layers(resnet(18, norm), ["res3.0.conv1"])[0] for norm in NORMS}
    assert kinds["BN"].kind == kinds["naiveSyncBN"].kind == BATCH and kinds["GN"].kind == GROUP
    assert isinstance(kinds["FrozenBN"].norm, FrozenBatchNorm2d) and kinds[""].norm is None
    assert resnet(18, "BN").output_shape()["res3"] == ShapeSpec(channels=128, stride=8)
