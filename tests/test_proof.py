"""Convs that can lose filters: the verdict of a traced pass, against what really setting rows to zero does."""

import collections
import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d as Detectron2Conv2d
from detectron2.layers import get_norm
from torch import nn
from torch.nn.utils import parametrizations, prune
from traced_nets import IMAGES, Net, build, calling, conv, is_silent, told, vary_norms, verdicts

from repr_det.method.criteria import on_output
from repr_det.method.layers import find_filter_layers
from repr_det.method.participants import Participants
from repr_det.network.norms import epsilon, norm_kind
from repr_det.network.proof import Reader, Verdict, first_that_refuses
from repr_det.network.watch import Watch

BN = nn.BatchNorm2d


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


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias)


class Frozen(nn.Module):
    """FrozenBN of nobody's library, which does not tell its eps; ``shape`` is that of its buffers."""

    def __init__(self, *shape, bias=True) -> None:
        super().__init__()
        for key, value in (("weight", 0.7), ("bias", 0.2), ("running_mean", 0.1), ("running_var", 2.0)):
            if bias or key != "bias":
                self.register_buffer(key, torch.full(shape, value))

    def forward(self, x):
        gain = self.weight / (self.running_var + 1e-3).sqrt()
        shift = getattr(self, "bias", 0) - self.running_mean * gain
        return x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def two_convs(join, channels=16) -> Net:
    """Two convs, and a norm with what ``join`` makes of them."""

    def run(net, x):
        return net.last(net.norm(join(net.a(x), net.b(x))).relu())

    return Net(run, a=conv(), b=conv(), norm=BN(channels), last=nn.Conv2d(channels, 8, 1))


def shuffled(x):
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def logging(net, x):
    x = net.a(x).relu()
    net.seen = net.a.weight.norm().item()
    return net.b(x)


def predicting(how) -> Net:
    """A backbone, and heads as detectors have them; ``how`` they give back what they predict."""

    def run(net, x):
        x = net.body(x).relu()
        return how(net, net.boxes(x), net.scores(x))

    return Net(run, body=conv(), boxes=conv(16), scores=conv(16))


GRID = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
BLUR = torch.full((16, 1, 3, 3), 1 / 9)


@dataclasses.dataclass(slots=True)
class Boxes:
    boxes: torch.Tensor


@dataclasses.dataclass(slots=True)
class Found(Boxes):
    scores: object


class Listed(list):
    """A list with an attribute."""


def listed(_, boxes, scores):
    found = Listed([boxes])
    found.scores = collections.deque([types.MappingProxyType({"scores": scores})])
    return found


def kept_aside(net, boxes, scores):
    net.seen = {"boxes": [boxes]}
    return scores


def sharing(first, second, key) -> nn.Module:
    net = build(conv(), BN(16), nn.ReLU(), conv(16), BN(16), nn.ReLU())
    setattr(net[second], key, getattr(net[first], key))
    return net


def sharing_convs() -> nn.Module:
    net = build(conv(), nn.ReLU(), conv(16), nn.ReLU(), conv(16), nn.ReLU())
    net[4].weight = net[2].weight
    return net


# What makes it; conv -> norm of those that take part; conv -> what is said of those that do not.
NETS = {
    "a sum in front of a norm": (lambda: two_convs(lambda a, b: a + b), {}, {"a": "", "b": ""}),
    "shuffled": (lambda: two_convs(lambda a, b: shuffled(torch.cat([a, b], 1)), 32), {}, {"a": "", "b": ""}),
    "a norm for two": (
        lambda: Net(
            lambda net, x: net.c(net.norm(net.b(net.norm(net.a(x)).relu())).relu()),
            a=conv(), norm=BN(16), b=conv(16), c=conv(16),
        ),
        {}, dict.fromkeys("ab", "its norm norm is that of others too"),
    ),
    "past its norm": (
        lambda: build(conv(), Net(lambda net, x: net.norm(x).relu() + x, norm=BN(16))),
        {}, {"0": "goes into a norm and elsewhere"},
    ),
    "a log": (lambda: Net(logging, a=conv(), b=conv(16)), {"a": None}, {"b": "it predicts"}),
    "a bias outside": (
        lambda: build(conv(), Net(lambda net, x: x + net.own.bias.view(-1, 1, 1), own=BN(16))),
        {}, {"0": "behind it comes add"},
    ),
    # A dropped filter of the gate would be a gate of one half.
    "gated": (
        lambda: build(conv(), BN(16), nn.SiLU(), torchvision.ops.SqueezeExcitation(16, 8)),
        {"0": "1", "3.fc1": None}, {"3.fc2": "sigmoid"},
    ),
    "over a pyramid": (
        lambda: Net(
            lambda net, x: [net.scores(net.norm(net.head(x[..., ::step])).relu()) for step in (1, 2)],
            head=conv(), norm=nn.GroupNorm(8, 16), scores=conv(16, 4),
        ),
        {"head": "norm"}, {"scores": "it predicts"},
    ),
    "a dict in a dataclass with slots": (
        lambda: predicting(lambda net, boxes, scores: Found(boxes.flatten(2), {"b": [scores.permute(0, 2, 3, 1)]})),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "a mapping in a queue in an attribute of a list": (
        lambda: predicting(listed), {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "an output in an attribute": (lambda: predicting(kept_aside), {"body": None}, {"boxes": "it predicts"}),
    "key points": (  # the centre of mass of each map
        lambda: predicting(lambda _, a, b: [a.relu().flatten(2) @ GRID, torch.einsum("nchw,hk->nckw", b, GRID[:8])]),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "pooled and blurred": (
        lambda: predicting(lambda _, a, b: [F.linear(a.flatten(2), GRID.T), F.conv2d(b, BLUR, groups=16)]),
        {"body": None}, dict.fromkeys(["boxes", "scores"], "it predicts"),
    ),
    "attention": (
        lambda: Net(
            lambda net, x: net.out((net.v(x).flatten(2) @ net.q(x).flatten(2).softmax(1).mT).unflatten(2, (8, 8))),
            q=conv(filters=64), v=conv(), out=conv(16, 4),
        ),
        {"v": None}, {"out": "it predicts"},
    ),
    "mixed over positions, with a bias": (
        lambda: build(conv(), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 64), nn.Unflatten(2, (8, 8))),
        {}, {"0": "behind it comes addmm"},
    ),
    "losses": (
        lambda: predicting(lambda _, a, b: F.mse_loss(a, torch.ones_like(a)) + b.square().mean()),
        {"body": None}, {"boxes": "", "scores": ""},
    ),
    "deformable": (
        lambda: build(conv(), nn.ReLU(), Net(
            lambda net, x: net.deformed(x, net.offsets(x)),
            offsets=conv(16, 18), deformed=torchvision.ops.DeformConv2d(16, 16, 3, padding=1),
        )),
        {"0": None}, {"2.offsets": "it tells deform_conv2d where to look"},
    ),
    "the largest of several channels": (
        lambda: build(conv(), BN(16), calling(lambda x: x.amax(1, keepdim=True))), {}, {"0": "behind it comes amax"}
    ),
    "a difference": (
        lambda: Net(
            lambda net, x: net.last(net.a(x).sigmoid() - net.b(x).exp()), a=conv(), b=conv(), last=conv(16)
        ),
        {}, {"a": "sigmoid", "b": "exp"},
    ),
    "a norm of every image": (
        lambda: build(conv(), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.ChannelShuffle(4)), {"0": "1"}, {}
    ),
    "a norm without a weight": (
        lambda: build(conv(), nn.Conv2d(16, 16, 1, groups=16), nn.GroupNorm(8, 16, affine=False)),
        {}, {"1": "which is no norm of its own with a weight"},
    ),
    "a norm of images": (lambda: build(conv(), Frozen(1, 16, 1, 1)), {}, {"0": "behind it comes add"}),
    "LN of Detectron2": (lambda: build(Detectron2Conv2d(3, 16, 3, norm=get_norm("LN", 16))), {}, {"0": ""}),
    "Detectron2's activation": (lambda: build(Detectron2Conv2d(3, 16, 3, activation=F.gelu)), {"0": None}, {}),
    "sigmoid inside": (lambda: build(Detectron2Conv2d(3, 16, 3, activation=torch.sigmoid)), {}, {"0": "sigmoid"}),
    "a scaled weight": (lambda: build(Scaled(3, 16, 3), BN(16)), {}, {"0": "its weight goes through mul"}),
    "pruning": (lambda: build(prune.random_unstructured(conv(), "weight", 0.5), BN(16)), {}, {"0": "weight"}),
    "weight norm": (lambda: build(parametrizations.weight_norm(conv()), BN(16)), {}, {"0": "weight"}),
    "a weight for two": (sharing_convs, {"0": None}, {"2": "4 computes with its weight too"}),
    "a bias for two": (lambda: sharing(0, 3, "bias"), {}, {"0": "3 computes with 0.bias too"}),
    "a beta for two": (lambda: sharing(1, 4, "bias"), {}, {"0": "4 computes with 1.bias too"}),
}  # fmt: skip
# Refused by rule, though these rows are silent: they are when others of their kind are not.
CAUTIOUS = {"a norm without a weight", "a weight for two"}


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


@pytest.mark.parametrize("error", [IndexError, ValueError, AssertionError])
def test_an_operator_in_python_that_takes_no_single_numbers_keeps_filters_in(error):
    def twice(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 4:
            raise error
        return 2 * x

    name = f"repr_det_tests::twice_{error.__name__}"
    try:
        operator = torch.library.custom_op(name, twice, mutates_args=(), tags=torch.Tag.pointwise)
    except TypeError:
        pytest.skip("this torch takes no tags")
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
