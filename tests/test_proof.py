"""Convs that can lose filters: the verdict of a traced pass, against what really setting rows to zero does."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import torchvision
from proved_nets import BN, CAUTIOUS, NETS, Frozen, shuffled
from torch import nn
from traced_nets import IMAGES, Net, build, calling, conv, is_silent, told, vary_norms, verdicts

from repr_det.method.criteria import on_output
from repr_det.method.layers import find_filter_layers
from repr_det.method.participants import Participants
from repr_det.network.norms import epsilon, norm_kind
from repr_det.network.proof import Reader, Verdict, first_that_refuses
from repr_det.network.watch import Watch


def in_place_on_a_view(x):
    x = x.clone()
    x[:, :4].add_(1)
    return x


def written(place, value=0.5, of=1):
    """The same with ``value`` at ``place``, or ``of`` a larger frame with it elsewhere."""

    def write(x):
        y = torch.full((*x.shape[:2], 10, 10), value) if of > 1 else x.clone()
        y[place] = x if of > 1 else value
        return y

    return calling(write)


MASK = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
MAP_ZERO_TO_ZERO = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(16), nn.ELU(), nn.SiLU(), nn.GELU()),
    *(nn.Hardswish(), nn.Tanh(), nn.Mish(), nn.Softsign(), nn.Identity(), nn.Dropout(0.3), nn.MaxPool2d(2)),
    *(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ZeroPad2d(1)),
    *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelUnshuffle(2), nn.Dropout2d(0.3), nn.Hardtanh()),
    *map(calling, (torch.abs, torch.expm1, lambda x: x.roll(8, 1), lambda x: x.pow(3), lambda x: x.clamp(min=0))),
    *map(calling, (lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x / (1 + x.abs()), lambda x: x * x.sigmoid())),
    *map(calling, (lambda x: x.masked_fill(MASK, 0.0), lambda x: x * 3 - x, lambda x: x.amax((2, 3), keepdim=True))),
    *map(calling, (lambda x: x[:, :8] * x[:, 8:], lambda x: x * x.mean((2, 3), True).sigmoid())),
    *(written((..., 0), 0.0), written((..., slice(1, 9), slice(1, 9)), 0.0, of=2)),
    *map(calling, (lambda x: torch.cat([x, torch.ones_like(x[:, :3])], 1), lambda x: torch.empty_like(x).copy_(x))),
    *map(calling, (lambda x: torch.cat([x, torch.zeros_like(x).flip(2)], 2), lambda x: x.amax((-1, 2), True))),
    *map(calling, (lambda x: x.to(memory_format=torch.channels_last), lambda x: x.mul_(2).relu_(), lambda x: x * MASK)),
]  # fmt: skip
MAP_ZERO_ELSEWHERE = [
    *(nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softmax(1), nn.ConstantPad2d(1, 0.5)),
    *(nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(1, 16), BN(16), nn.LayerNorm([16, 8, 8])),
    *map(calling, (torch.exp, torch.cos, lambda x: x + 1, lambda x: 1 - x, lambda x: x.clamp(min=0.1))),
    *map(calling, (in_place_on_a_view, lambda x: x.add_(0.5), lambda x: torch.where(MASK, x, 1.0))),
    *map(calling, (lambda x: x.masked_fill(MASK, 0.5), lambda x: torch.maximum(x, torch.tensor(0.1)))),
    *map(calling, (lambda x: F.pad(x, (1, 1), value=0.2), lambda x: torch.logaddexp(x, x))),
    *(written((..., 0)), written((..., torch.arange(8) > 5)), written((..., slice(1, 9), slice(1, 9)), of=2)),
    *(calling(lambda x, dim=dim: torch.stack([x, torch.ones_like(x)], dim).flatten(2, 3)) for dim in (2, 3)),
    calling(lambda x: x.select_scatter(x.new_ones(4, 16, 8), 2, 0)),
    # The halves of one output are other channels to each other.
    *map(calling, (lambda x: x[:, :8].sigmoid() * x[:, 8:], lambda x: torch.maximum(*x.chunk(2, 1)))),
    *map(calling, (lambda x: (1 + x.view(4, 2, 8, 8, 8)[:, 0]) * x[:, 8:], lambda x: x[:, :8].softmax(1) * x[:, 8:])),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(MAP_ZERO_TO_ZERO)))
def test_what_maps_0_to_0_lets_a_filter_be_silent(place):
    norms = [[BN(16)], [nn.GroupNorm(8, 16)], []][place % 3]
    net = build(conv(), *norms, MAP_ZERO_TO_ZERO[place])
    found = verdicts(net)["0"]
    assert (found.reason, found.norm) == ("", "1" if norms else None)
    assert is_silent(net, "0", found.norm)


@pytest.mark.parametrize("place", range(len(MAP_ZERO_ELSEWHERE)))
def test_what_does_not_map_0_to_0_keeps_filters_in(place):
    net = build(conv(), BN(16), MAP_ZERO_ELSEWHERE[place])
    assert verdicts(net)["0"].reason
    assert not is_silent(net, "0", "1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETS)
def test_networks(name):
    make, norms, reasons = NETS[name]
    torch.manual_seed(0)
    net = vary_norms(make())
    found = verdicts(net)
    for one, norm in norms.items():
        assert (found[one].reason, found[one].norm) == ("", norm)
        assert is_silent(net, one, norm)
    for one, reason in reasons.items():
        assert found[one].reason and reason in found[one].reason
        assert name in CAUTIOUS or not is_silent(net, one, None)


def test_what_a_forward_hook_gets_has_left():
    """As features for distillation do; not so what hooks of this package get, and hooks in front of a pass."""
    net = build(conv(), BN(16), nn.ReLU(), conv(16), BN(16), nn.ReLU())
    net[3].register_forward_pre_hook(lambda *_: None)
    with on_output(find_filter_layers(net, ["*"]), lambda *_: None):
        assert told(verdicts(net)) == {"0": ("", "1"), "3": ("", "4"), "6": ("", None)}
    watch = Watch(net, ["0"])
    net(IMAGES)
    features = []
    handle = net[2].register_forward_hook(lambda _, __, output: features.append(output))
    reason = "a forward hook of 2 gets its channels: remove it if it only logs"
    assert told(verdicts(net)) == {"0": (reason, "1"), "3": ("", "4"), "6": ("", None)}
    resumed = Watch(net, ["0"])
    resumed.load_state_dict(watch.state_dict())
    assert resumed.reasons() == watch.reasons() == {"0": reason}
    assert (watch.others(), resumed.others()) == (["3", "6"], [])  # there it has seen no pass
    handle.remove()
    assert not resumed.reasons() and not watch.reasons() and not verdicts(net)["0"].reason


@pytest.mark.skipif(
    "tags" not in inspect.signature(torch.library.custom_op).parameters, reason="needs tags (torch 2.5)"
)
@pytest.mark.parametrize("error", [IndexError, ValueError, AssertionError])
def test_an_operator_in_python_that_takes_no_single_numbers_keeps_filters_in(error):
    def twice(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 4:
            raise error
        return 2 * x

    name = f"repr_det_tests::twice_{error.__name__}"
    operator = torch.library.custom_op(name, twice, mutates_args=(), tags=torch.Tag.pointwise)
    operator.register_autograd(lambda _, gradient: 2 * gradient)
    found = told(verdicts(build(conv(), BN(16), calling(operator))))
    assert found["0"] == (f"behind it comes twice_{error.__name__}, which does not make 0 of a channel that is 0", "1")


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_is_known_by_what_it_does(bias):
    norm = Frozen(16, bias=bias)
    net = build(conv(), norm, nn.ReLU())
    verdict = verdicts(net)["0"]
    assert (verdict.reason, verdict.norm, verdict.rectified, norm_kind(norm)) == ("", "1", True, "frozen")
    assert epsilon(norm) == pytest.approx(1e-3) and is_silent(net, "0", "1")
    (layer,) = find_filter_layers(net, ["0"])
    assert layer.norm is norm and ("norm.bias" in layer.tensors()) == bias


def residual(net, x):
    x = net.bn1(net.conv1(x)).relu()
    x = (x + net.bn2(net.conv2(x))).relu()
    return net.classifier(net.conv3(x).relu().mean((2, 3)))


def test_readers_of_a_residual_block_and_of_what_is_gated():
    modules = {"conv3": conv(16), "conv2": conv(16), "bn1": BN(16), "bn2": BN(16), "conv1": conv()}
    found = verdicts(Net(residual, **modules, classifier=nn.Linear(16, 5)))
    assert told(found) == {"conv1": ("", "bn1"), "conv2": ("", "bn2"), "conv3": ("", None)}
    assert found["conv1"].readers == {Reader("conv2", True, True), Reader("conv3", True, False)}
    assert found["conv2"].readers == {Reader("conv3", True, False)}
    assert found["conv3"].readers == {Reader("classifier", True, True)}
    assert [found[name].rectified for name in ("conv1", "conv2", "conv3")] == [True, False, True]
    assert verdicts(NETS["gated"][0]())["0"].readers == {Reader("3.fc1", True, True), Reader("4", True, True)}
    assert verdicts(NETS["over a pyramid"][0]())["head"].readers == {Reader("scores", True, True)}
    ranks = [{"a": Verdict(readers={Reader(name, True, True)})} for name in "bc"]
    assert {reader.name for reader in first_that_refuses(ranks)["a"].readers} == {"b", "c"}


@pytest.mark.parametrize("run", [lambda head, a, b: [head(a), head(b)], lambda head, a, b: head(torch.cat([a, b], 2))])
def test_a_head_that_reads_several_convs_reads_none_alone(run):
    net = Net(lambda net, x: run(net.head, net.a(x), net.b(x)), a=conv(), b=conv(), head=conv(16, 4))
    found = verdicts(net)
    assert found["a"].readers == found["b"].readers == {Reader("head", True, False)}


SUM = Reader("", False, False)  # over channels


@pytest.mark.parametrize(
    ("behind", "reader", "silent"),
    [
        ([calling(lambda x: torch.cat([x, x], 1)), nn.Conv2d(32, 8, 1)], {Reader("3", False, True)}, True),
        ([calling(shuffled), nn.Conv2d(16, 8, 1)], {Reader("3", False, True)}, True),
        ([nn.Flatten(), nn.LazyLinear(8), nn.Unflatten(1, (8, 1, 1))], {Reader("3", True, True, 64)}, True),
        ([nn.Conv2d(16, 8, 3, groups=4)], {Reader("2", True, True)}, None),  # other groups stay as they are
        # The kernels that read it read the others too: they must not be set to 0 when it returns.
        ([calling(lambda x: x - x.mean(1, keepdim=True))], {SUM, Reader("3", True, False)}, None),
        ([calling(F.normalize)], {SUM, Reader("3", True, True)}, None),
        ([calling(lambda x: x.flip(1))], {Reader("3", False, True)}, True),
        ([calling(lambda x: x.flip(2)[:, :, 1:].transpose(2, 3))], {Reader("3", True, True)}, True),
    ],
    ids=["cat", "shuffle", "flatten", "groups", "less the mean", "normalize", "flip", "over positions"],
)
def test_readers_of_channels_that_have_moved(behind, reader, silent):
    net = build(conv(), nn.ReLU(), *behind)
    assert verdicts(net)["0"].readers == reader
    assert silent is None or is_silent(net, "0", None)


# Convs that take part, of all that train. Of DenseNet those in front of a norm of their own; of EfficientNet all but
# the gates; of ShuffleNet all but those whose norm gets nothing else and whose shuffled channels leave with others.
TORCHVISION = {"densenet121": (58, 120), "efficientnet_b0": (65, 81), "shufflenet_v2_x0_5": (56, 56)}


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    """All filters at once: the kernels that read a dropped channel, whatever they are, change nothing."""
    torch.manual_seed(0)
    net = vary_norms(getattr(torchvision.models, name)(num_classes=4)).eval()  # without dropout
    images = torch.randn(2, 3, 64, 64)
    participants = Participants(find_filter_layers(net, ["*"]), net)
    net(images)
    layers = participants.agreed()
    assert (len(layers), len(participants.candidates)) == TORCHVISION[name]
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.tensors().values():
                tensor[:2] = 0
        before = net(images)
        assert before.abs().sum() > 0
        own = {layer.name for layer in layers}
        for layer in layers:
            for reader in layer.readers:
                kernels = net.get_submodule(reader.name).weight
                if reader.aligned and reader.alone and kernels.shape[1] == layer.num_filters * reader.span:
                    kernels[2 if reader.name in own else 0 :, : 2 * reader.span] = 0.1
        torch.testing.assert_close(net(images), before)
