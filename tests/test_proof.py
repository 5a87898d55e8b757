"""Which convs can lose filters: the verdict of a traced pass, against what really setting rows to zero does."""

import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d as Detectron2Conv2d
from torch import nn
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from traced_nets import IMAGES, ROWS, build, is_silent, reasons, vary_norms, verdicts

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.method.participants import Participants
from repr_det.network.proof import Reader
from repr_det.network.watch import Watch


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(inputs=3, filters=16) -> nn.Conv2d:
    return nn.Conv2d(inputs, filters, 3, padding=1)


def in_place_on_a_view(x):
    x = x.clone()
    x[:, :4].add_(1)
    return x


def halves_swapped(x):
    return torch.cat([x[:, 8:], x[:, :8]], 1)


MASK = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
MAP_ZERO_TO_ZERO = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(16), nn.ELU(), nn.SiLU(), nn.GELU()),
    *(nn.Hardswish(), nn.Tanh(), nn.Mish(), nn.Softsign(), nn.Identity(), nn.Dropout(0.3), nn.MaxPool2d(2)),
    *(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ZeroPad2d(1)),
    *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelUnshuffle(2), nn.Dropout2d(0.3), nn.Hardtanh()),
    *map(Call, (torch.abs, torch.expm1, halves_swapped, lambda x: x.pow(3), lambda x: x.clamp(min=0))),
    *map(Call, (lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x / (1 + x.abs()), lambda x: x * x.sigmoid())),
    *map(Call, (lambda x: x.masked_fill(MASK, 0.0), lambda x: x * 3 - x)),
    *map(Call, (lambda x: x.to(memory_format=torch.channels_last), lambda x: x.mul_(2).relu_(), lambda x: x * MASK)),
]  # fmt: skip
MAP_ZERO_ELSEWHERE = [
    *(nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softmax(1), nn.ConstantPad2d(1, 0.5)),
    *(nn.InstanceNorm2d(16, affine=True), nn.GroupNorm(1, 16), nn.BatchNorm2d(16), nn.LayerNorm([16, 8, 8])),
    *map(Call, (torch.exp, torch.cos, lambda x: x + 1, lambda x: 1 - x, lambda x: x.clamp(min=0.1))),
    *map(Call, (in_place_on_a_view, lambda x: x.add_(0.5), lambda x: torch.where(MASK, x, 1.0))),
    *map(Call, (lambda x: x.masked_fill(MASK, 0.5), lambda x: torch.maximum(x, torch.tensor(0.1)))),
    *map(Call, (lambda x: F.pad(x, (1, 1), value=0.2), lambda x: torch.logaddexp(x, x))),
]  # fmt: skip


@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", "none"])
@pytest.mark.parametrize("place", range(len(MAP_ZERO_TO_ZERO)))
def test_what_maps_0_to_0_lets_a_filter_be_silent(place, norm):
    norms = {"BatchNorm2d": [nn.BatchNorm2d(16)], "GroupNorm": [nn.GroupNorm(8, 16)], "none": []}[norm]
    net = build(conv(), *norms, MAP_ZERO_TO_ZERO[place])
    found = verdicts(net)["0"]
    assert (found.reason, found.norm) == ("", "1" if norms else None)
    assert is_silent(net, "0", found.norm)


@pytest.mark.parametrize("place", range(len(MAP_ZERO_ELSEWHERE)))
def test_what_does_not_map_0_to_0_keeps_filters_in(place):
    net = build(conv(), nn.BatchNorm2d(16), MAP_ZERO_ELSEWHERE[place])
    assert reasons(net)["0"]
    assert not is_silent(net, "0", "1")


# --- norms ----------------------------------------------------------------------------------------------------------


class TwoConvs(nn.Module):
    """Two convs, and a norm with what ``join`` makes of them."""

    def __init__(self, join, channels) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = conv(), conv(), nn.BatchNorm2d(channels)
        self.join = join
        self.last = nn.Conv2d(channels, 8, 1)

    def forward(self, x):
        return self.last(self.norm(self.join(self.a(x), self.b(x))).relu()).mean((2, 3))


def shuffled(x):
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize(
    ("join", "channels"),
    [
        (lambda a, b: a + b, 16),
        (lambda a, b: a * b, 16),
        (lambda a, b: torch.cat([a, b], 1), 32),
        (lambda a, b: shuffled(torch.cat([a, b], 1)), 32),
        (lambda a, b: shuffled(a) + 0 * b, 16),
        (lambda a, b: F.max_pool2d(a, 2) - F.avg_pool2d(b, 2), 16),
        (lambda a, b: torch.stack([a, b]).amax(0), 16),
        (lambda a, b: a[:, torch.arange(15, -1, -1)] + b, 16),
    ],
)
def test_a_norm_of_more_than_the_conv_keeps_filters_in(join, channels):
    """Its beta is of another channel, or of one that others fill too."""
    net = vary_norms(TwoConvs(join, channels))
    found = reasons(net)
    assert found["a"] and found["b"]
    assert not is_silent(net, "a", None)


@pytest.mark.parametrize("outside", ["a", "b", None])
def test_a_norm_that_is_shared_keeps_filters_in(outside):
    """Also where the other conv takes no part: its channels would go too."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = conv(), nn.BatchNorm2d(16), conv(16), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            x = self.norm(self.b(self.norm(self.a(x)).relu()))
            return self.c(x.relu()).mean((2, 3))

    net = Shared()
    include = [name for name in "ab" if name != outside]
    found = verdicts(net, include=include)
    assert all("its norm norm is that of others too" in verdict.reason for verdict in found.values())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16, affine=False), nn.GroupNorm(8, 16, affine=False)])
def test_norms_without_a_weight(norm):
    """Of constant channels they make -mean / deviation."""
    net = build(conv(), nn.Conv2d(16, 16, 1, groups=16), norm, nn.ReLU())
    assert "which is no norm of its own with a weight" in reasons(net)["1"]


def test_norms_are_known_by_what_they_hold():
    class Frozen(nn.Module):
        """FrozenBN of nobody's library; eps in the middle of a sum."""

        def __init__(self, channels) -> None:
            super().__init__()
            for key, value in (("weight", 0.7), ("bias", 0.2), ("running_mean", 0.1), ("running_var", 2.0)):
                self.register_buffer(key, torch.full((channels,), value))

        def forward(self, x):
            gain = self.weight / (self.running_var + 1e-3).sqrt()
            return x * gain.view(1, -1, 1, 1) + (self.bias - self.running_mean * gain).view(1, -1, 1, 1)

    net = build(conv(), Frozen(16), nn.SiLU())
    assert verdicts(net)["0"].norm == "1" and not reasons(net)["0"]
    with torch.no_grad():  # as the buffers of a dropped filter
        for buffer in (net[1].weight, net[1].bias):
            buffer[ROWS] = 0
        assert not net[:3](IMAGES)[:, ROWS].any()


def test_a_norm_between_other_modules_in_any_order():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first_norm, self.second_norm = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
            self.second, self.first, self.last = conv(16), conv(), conv(16, 4)

        def forward(self, x):
            x = self.first_norm(self.first(x)).relu()
            return self.last(self.second_norm(self.second(x)).relu()).mean((2, 3))

    net = vary_norms(Odd())
    found = verdicts(net)
    assert {name: verdict.norm for name, verdict in found.items() if not verdict.reason} == {
        "first": "first_norm",
        "second": "second_norm",
    }
    assert all(is_silent(net, name, found[name].norm) for name in ("first", "second"))
    assert "it predicts" in found["last"].reason


def test_an_output_that_goes_past_the_norm():
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = conv(), nn.BatchNorm2d(16), conv(16)

        def forward(self, x):
            raw = self.a(x)
            return self.b(self.norm(raw).relu() + raw).mean((2, 3))

    assert "goes into a norm and elsewhere" in reasons(Past())["a"]


# --- weights that are not what is computed --------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(self.weight.view(1, self.out_channels, -1), None, None, training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Masked(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * torch.ones_like(self.weight).tril(), self.bias)


class LowRank(nn.Conv2d):
    """LoRA: W + B A."""

    def __init__(self, *arguments, **keys) -> None:
        super().__init__(*arguments, **keys)
        self.a, self.b = nn.Parameter(torch.randn(4, self.weight[0].numel())), nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return self._conv_forward(x, self.weight + (self.b @ self.a).view_as(self.weight), self.bias)


def of_class(cls, **keys):
    return lambda: [cls(3, 16, 3, padding=1, **keys), nn.BatchNorm2d(16)]


def quantised() -> list[nn.Module]:
    qconfig = get_default_qat_qconfig("fbgemm")
    return [qat.ConvBn2d(3, 16, 3, padding=1, qconfig=qconfig), nn.Identity()]


def pruned() -> list[nn.Module]:
    pruned = conv()
    prune.random_unstructured(pruned, "weight", 0.5)
    return [pruned, nn.BatchNorm2d(16)]


OTHER_WEIGHTS = {
    "weight standardisation": of_class(Standardised),
    "mask": of_class(Masked),
    "low rank": of_class(LowRank),
    "quantisation-aware": quantised,
    "pruning": pruned,
    "weight norm": lambda: [parametrizations.weight_norm(conv()), nn.BatchNorm2d(16)],
    "spectral norm": lambda: [parametrizations.spectral_norm(conv()), nn.BatchNorm2d(16)],
    "old weight norm": lambda: [nn.utils.weight_norm(conv()), nn.BatchNorm2d(16)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_a_conv_that_computes_with_another_weight_than_its_own_stays_out(kind):
    """Scores and new directions would be of rows that the network does not see."""
    net = build(*OTHER_WEIGHTS[kind](), nn.ReLU())
    assert "weight" in reasons(net)["0"]
    assert not is_silent(net, "0", None)


def test_convs_that_share_their_weight_stay_out():
    net = build(conv(), nn.ReLU(), conv(16), nn.ReLU(), conv(16), nn.ReLU())
    net[4].weight = net[2].weight
    found = reasons(net)
    assert "4 computes with its weight too" in found["2"] and not found["0"]


# --- forward passes of one's own ------------------------------------------------------------------------------------


class NormInside(nn.Conv2d):
    def __init__(self, *arguments, **keys) -> None:
        super().__init__(*arguments, **keys)
        self.own_norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return F.silu(self.own_norm(super().forward(x)))


class Shifted(nn.Conv2d):
    """A gain and shift under other names."""

    def __init__(self, *arguments, **keys) -> None:
        super().__init__(*arguments, **keys)
        self.shift = nn.Parameter(torch.full((1, self.out_channels, 1, 1), 0.3))

    def forward(self, x):
        return super().forward(x) + self.shift


def test_subclasses_with_a_forward_pass_of_their_own():
    for make, norm, takes_part in (
        (lambda: NormInside(3, 16, 3), "0.own_norm", True),
        (lambda: Detectron2Conv2d(3, 16, 3, norm=nn.BatchNorm2d(16), activation=F.relu), "0.norm", True),
        (lambda: Detectron2Conv2d(3, 16, 3, activation=F.gelu), None, True),
        (lambda: Detectron2Conv2d(3, 16, 3, activation=torch.sigmoid), None, False),
        (lambda: Shifted(3, 16, 3), None, False),
    ):
        net = build(make())
        found = verdicts(net)["0"]
        assert (not found.reason) == takes_part == is_silent(net, "0", norm)
        assert not takes_part or found.norm == norm


def test_a_bias_that_is_added_outside_the_conv():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 4, 1)
            self.bias = nn.Parameter(torch.rand(16, 1, 1))

        def forward(self, x):
            return self.b((self.a(x) + self.bias).relu()).mean((2, 3))

    net = Outside()
    assert reasons(net)["a"] and not is_silent(net, "a", None)


# --- what reads a channel -------------------------------------------------------------------------------------------


class Predicting(nn.Module):
    """A backbone, and heads as detectors have them; ``how`` they give back what they predict."""

    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.boxes, self.scores, self.how = conv(), conv(16), conv(16), how

    def forward(self, x):
        x = self.body(x).relu()
        return self.how(self, self.boxes(x), self.scores(x))


def kept_aside(net, boxes, scores):
    net.seen = [boxes]
    return scores


@pytest.mark.parametrize(
    "how",
    [
        lambda net, boxes, scores: (boxes, scores),
        lambda net, boxes, scores: {"boxes": [boxes.flatten(2)], "scores": [scores.permute(0, 2, 3, 1)]},
        lambda net, boxes, scores: torch.cat([boxes, scores], 1),
        lambda net, boxes, scores: boxes.abs() * scores,
        kept_aside,
        lambda net, boxes, scores: F.mse_loss(boxes, torch.ones_like(boxes)) + scores.square().mean(),
    ],
)  # fmt: skip
def test_convs_that_predict_stay_out(how):
    net = Predicting(how)
    found = reasons(net)
    assert not found["body"] and found["boxes"] and found["scores"]
    assert is_silent(net, "body", None) and not is_silent(net, "boxes", None)


def test_a_gate_stays_out_and_what_it_gates_takes_part():
    """Squeeze-and-excitation: a dropped filter of the gate would be a gate of one half."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.norm, self.last = conv(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
            self.squeeze, self.gate = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x):
            x = F.silu(self.norm(self.body(x)))
            x = x * self.gate(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
            return self.last(x).mean((2, 3))

    net = vary_norms(Gated())
    found = verdicts(net)
    assert [name for name, verdict in found.items() if not verdict.reason] == ["body", "squeeze"]
    assert found["body"].readers == {Reader("squeeze", True, True), Reader("last", True, True)}
    assert found["body"].norm == "norm" and is_silent(net, "body", "norm") and is_silent(net, "squeeze", None)
    assert "sigmoid" in found["gate"].reason and not is_silent(net, "gate", None)


class Steered(nn.Module):
    """A conv that says where another operation looks: 0 is one place, as good as others."""

    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.offsets, self.how = conv(), conv(16, {"deform": 18, "grid": 2}[how]), how
        self.deformed = torchvision.ops.DeformConv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.body(x).relu()
        where = self.offsets(x)
        if self.how == "deform":
            return self.last(self.deformed(x, where)).mean((2, 3))
        return self.last(F.grid_sample(x, where.permute(0, 2, 3, 1), align_corners=False)).mean((2, 3))


@pytest.mark.parametrize("how", ["deform", "grid"])
def test_a_conv_that_steers_another_operation_stays_out(how):
    found = reasons(Steered(how))
    assert not found["body"] and found["offsets"]


class Residual(nn.Module):
    """conv2's channels are added to a shortcut, and read by conv3 alone."""

    def __init__(self, join=torch.add) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv(16), nn.BatchNorm2d(16)
        self.conv3, self.classifier = conv(16), nn.Linear(16, 5)
        self.join = join

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.join(x, self.bn2(self.conv2(x))).relu()
        return self.classifier(self.conv3(x).relu().mean((2, 3)))


def test_readers_of_a_residual_block():
    """What is added to a shortcut is silent where it adds nothing; its kernels there belong to the shortcut too."""
    net = vary_norms(Residual())
    found = verdicts(net)
    assert not any(verdict.reason for verdict in found.values())
    assert found["conv1"].readers == {Reader("conv2", True, True), Reader("conv3", True, False)}
    assert found["conv2"].readers == {Reader("conv3", True, False)}
    assert found["conv3"].readers == {Reader("classifier", True, True)}
    assert {name: verdict.rectified for name, verdict in found.items()} == {
        "conv1": True,
        "conv2": False,
        "conv3": True,
    }
    with torch.no_grad():  # the input of conv3, by hand
        for parameter in (net.conv2.weight, net.conv2.bias, net.bn2.weight, net.bn2.bias):
            parameter[ROWS] = 0
        read = []
        net.conv3.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        net(IMAGES)
        shortcut = net.bn1(net.conv1(IMAGES)).relu()
        torch.testing.assert_close(read[0][:, ROWS], shortcut[:, ROWS])


def test_a_channel_with_others_taken_off_is_not_alone():
    """The kernels that read it read the others too: they must not be set to 0 when it returns."""
    net = build(conv(), nn.BatchNorm2d(16), Call(lambda x: x - x.mean(1, keepdim=True)))
    assert verdicts(net)["0"].readers == {Reader("3", False, False)}


def test_the_largest_of_several_channels_may_be_one_that_is_0():
    """A dropped filter would be heard wherever all others are below 0."""
    net = build(conv(), nn.BatchNorm2d(16), Call(lambda x: x.amax(1, keepdim=True)))
    assert "behind it comes amax" in reasons(net)["0"]
    over_positions = build(conv(), nn.BatchNorm2d(16), Call(lambda x: x.amax((2, 3), keepdim=True)))
    assert not reasons(over_positions)["0"] and is_silent(over_positions, "0", "1")


@pytest.mark.parametrize("how", ["cat", "shuffle", "flatten", "groups"])
def test_readers_of_channels_that_have_moved(how):
    moved = {
        "cat": [Call(lambda x: torch.cat([x, x], 1)), nn.Conv2d(32, 8, 1)],
        "shuffle": [Call(shuffled), nn.Conv2d(16, 8, 1)],
        "flatten": [nn.Flatten(), nn.LazyLinear(8), nn.Unflatten(1, (8, 1, 1))],
        "groups": [nn.Conv2d(16, 8, 3, groups=4)],
    }[how]
    net = build(conv(), nn.ReLU(), *moved)
    (reader,) = verdicts(net)["0"].readers
    assert reader.aligned == (how in ("groups", "flatten")) and reader.alone
    assert reader.span == (64 if how == "flatten" else 1)
    assert how == "groups" or is_silent(net, "0", None)  # else other groups stay as they are


# --- how a network is run -------------------------------------------------------------------------------------------


def plain_net() -> nn.Sequential:
    """What "0" and "3" of it are: taking part, with a norm each."""
    return build(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv(16), nn.BatchNorm2d(16), nn.ReLU())


PLAIN = {"0": ("", "1"), "3": ("", "4"), "6": ("", None)}


def told(net, run=None):
    return {name: (verdict.reason, verdict.norm) for name, verdict in verdicts(net, run).items()}


def test_autocast_and_half_precision():
    net = plain_net()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(IMAGES)

    assert told(net, run) == PLAIN
    assert told(net.double(), lambda: net(IMAGES.double())) == PLAIN


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    net = plain_net()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = net[:6], net[6:]

        def forward(self, x):
            return self.rest(checkpoint(self.first, x, use_reentrant=reentrant))

    model = Checkpointed()
    found = told(model, lambda: model(IMAGES.clone().requires_grad_()).sum().backward())
    assert found == {f"first.{n}": (r, f"first.{m}") for n, (r, m) in PLAIN.items() if m} | {"rest.6": ("", None)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks(backend):
    """The traced pass runs as it is; later ones are compiled, and see no trace any more."""
    torch._dynamo.reset()
    net = plain_net()
    compiled = torch.compile(net, backend=backend)
    with torch.no_grad():
        expected = net.eval()(IMAGES)
    net.train()
    watch = Watch(net, list(PLAIN))
    for _ in range(2):
        compiled(IMAGES).sum().backward()
        watch.hear()
    assert {n: (v.reason, v.norm) for n, v in watch.verdicts.items()} == PLAIN and watch.traced == 1
    with torch.no_grad():
        net.eval()
        assert compiled(IMAGES).shape == expected.shape
    torch._dynamo.reset()


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them, which needs CUDA: parameters are plain tensors of another copy."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter * 1)
    replica._buffers = {name: buffer.clone() for name, buffer in module._buffers.items()}
    return replica


def test_replicas_of_data_parallel_in_threads():
    net = plain_net()
    watch = Watch(net, list(PLAIN))
    replicas = [replica_of(net) for _ in range(3)]
    threads = [threading.Thread(target=lambda replica=replica: replica(IMAGES)) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: (v.reason, v.norm) for n, v in watch.verdicts.items()} == PLAIN


def test_parts_that_are_called_on_their_own():
    """A loop that calls ``model.body`` and a loss on what it puts out: its last conv predicts."""
    model = nn.ModuleDict({"body": plain_net()[:6], "head": nn.Conv2d(16, 4, 1)})
    found = told(model, lambda: model["head"](model["body"](IMAGES)))
    assert found["body.0"] == ("", "body.1")
    assert "it predicts" in found["body.3"][0]


def test_a_conv_that_runs_more_than_once_a_pass():
    """A head over the levels of a pyramid."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.norm, self.scores = conv(), nn.GroupNorm(8, 16), conv(16, 4)

        def forward(self, x):
            return [self.scores(self.norm(self.head(x[..., ::step])).relu()) for step in (1, 2)]

    found = told(Pyramid(), None)
    assert found["head"] == ("", "norm") and "it predicts" in found["scores"][0]


class Late(nn.Module):
    """A conv that runs from some pass on, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late, self.never, self.last = conv(), conv(16), conv(16), conv(16, 4)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = self.always(x).relu()
        if self.passes > 2:
            x = x + self.late(x).relu()
        return self.last(x).mean((2, 3))


def test_a_conv_is_proved_when_it_first_runs():
    net = Late()
    watch = Watch(net, ["always", "late", "never", "last"])
    for number in range(5):
        net(IMAGES)
        if watch.news:
            watch.hear()
        found = [name for name, verdict in watch.verdicts.items() if not verdict.reason]
        assert found == (["always"] if number < 3 else ["always", "late"])
    assert watch.traced == 2  # the first pass, and the one after the first with "late"
    assert "never (it has not run in a training pass" in " ".join(watch.left_out())


def test_all_passes_of_the_first_step_count():
    """As a loss on features has it: the whole network, and a part of it on its own."""
    net = plain_net()
    watch = Watch(net, list(PLAIN))
    net(IMAGES)
    net[:5](IMAGES)  # a Sequential of the same convs, which is not watched
    assert watch.traced == 1 and not watch.verdicts["3"].reason
    model = nn.ModuleDict({"body": plain_net()[:6], "head": nn.Conv2d(16, 4, 1)})
    model.forward = lambda x: model["head"](model["body"](x)).mean((2, 3))
    watch = Watch(model, ["body.0", "body.3"])
    model(IMAGES)
    assert not watch.verdicts["body.3"].reason
    model["body"](IMAGES)
    assert "it predicts" in watch.verdicts["body.3"].reason and not watch.verdicts["body.0"].reason
    watch.hear()
    net(IMAGES)
    assert watch.traced == 2


def test_only_training_passes_are_looked_at():
    net = plain_net()
    participants = Participants(find_filter_layers(net, ["*"]), net)
    with torch.no_grad():
        net(IMAGES)
    with pytest.raises(RuntimeError):  # a pass that ends in an error shows nothing
        net(IMAGES[:, :2])
    assert not participants.known
    with pytest.raises(UserError, match=r"no pass of this model has been seen: give RePr the module that you call"):
        participants.agreed()
    net(IMAGES)
    assert participants.known and participants.news and participants.trains
    assert [layer.name for layer in participants.hear()] == list(PLAIN)
    assert not participants.news
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_stays_out_is_said_once(caplog):
    net = build(conv(), nn.Sigmoid(), conv(16), nn.ReLU())
    participants = Participants(find_filter_layers(net, ["*"]), net)
    with caplog.at_level("INFO", "repr_det"):
        for _ in range(2):
            net(IMAGES)
            assert [layer.name for layer in participants.hear()] == ["2", "4"]
    assert caplog.text.count("all filters stay of 0 (behind it comes sigmoid, which does not make 0 of") == 1


def test_where_nothing_takes_part_the_reasons_and_what_could_are_named():
    net = build(conv(), nn.Sigmoid(), conv(16), nn.ReLU())
    participants = Participants(find_filter_layers(net, ["0"]), net)
    net(IMAGES)
    with pytest.raises(UserError) as error:
        participants.agreed()
    assert str(error.value) == (
        "no filter can be dropped of the convs that layers= names: 0 (behind it comes sigmoid, which does not make 0 "
        "of a channel that is 0); these could: 2, 4"
    )


# --- networks of others ---------------------------------------------------------------------------------------------

# Convs that take part, of all that train. Of DenseNet those in front of a norm of their own; of EfficientNet all but
# the gates; of ShuffleNet all but those whose norm gets nothing else and whose shuffled channels leave with others.
TORCHVISION = {
    "resnet18": (20, 20),
    "densenet121": (58, 120),
    "mobilenet_v2": (52, 52),
    "efficientnet_b0": (65, 81),
    "shufflenet_v2_x0_5": (56, 56),
    "vgg11": (8, 8),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    """All filters at once: the kernels that read a dropped channel, whatever they are, change nothing."""
    torch.manual_seed(0)
    net = vary_norms(getattr(torchvision.models, name)(num_classes=4))
    for module in net.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # dropout, stochastic depth
    images = torch.randn(2, 3, 64, 64)
    participants = Participants(find_filter_layers(net, ["*"]), net)
    net(images)
    layers = participants.agreed()
    assert (len(layers), len(participants.candidates)) == TORCHVISION[name]
    modules = dict(net.named_modules())
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.tensors().values():
                tensor[:2] = 0
        before = net(images)
        assert before.abs().sum() > 0
        own = {layer.name for layer in layers}
        for layer in layers:
            for reader in layer.readers:
                kernels = modules[reader.name].weight
                if reader.aligned and reader.alone and kernels.shape[1] == layer.num_filters * reader.span:
                    kernels[2 if reader.name in own else 0 :, : 2 * reader.span] = 0.1
        torch.testing.assert_close(net(images), before)
