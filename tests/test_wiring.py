"""Norms that are registered in another order than they run: found from a sample, or refused at the first drop."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain_nets import largest_dropped
from torch import nn

from repr_det import RePr, RePrScheme, UserError, find_filter_layers


class Net(nn.Module):
    """``order``: names of the modules as they are registered; they run as conv1, bn1, ReLU, conv2, bn2, ReLU, fc."""

    def __init__(self, order: str, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in order.split():
            width = 3 if name == "conv1" else 16
            setattr(self, name, norm(16) if name.startswith("bn") else nn.Conv2d(width, 16, 3, padding=1))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(F.relu_(self.bn2(self.conv2(x))).mean((2, 3)))


class PreActivation(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))), the norms registered behind the convs that they stand before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc((x + out).mean((2, 3)))


class ReluBetween(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(16),
            nn.AvgPool2d(6),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


IMAGES, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
OUT_OF_ORDER = "conv1 conv2 bn1 bn2"


def train(net, opt, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(IMAGES), LABELS).backward()
        opt.step()


def scheme_of(net, **options):
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    return opt, RePrScheme(find_filter_layers(net, ["*"], **options), opt)


def norms(net, **options):
    names = {module: name for name, module in net.named_modules()}
    return {x.name: names.get(x.norm) for x in find_filter_layers(net, ["*"], **options)}


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (Net(OUT_OF_ORDER), {"conv1": "bn1", "conv2": "bn2"}),
        (Net("bn2 bn1 conv2 conv1"), {"conv2": "bn2", "conv1": "bn1"}),
        (Net("conv2 bn1 conv1 bn2", norm=lambda c: nn.GroupNorm(4, c)), {"conv2": "bn2", "conv1": "bn1"}),
        # A norm of the sum stands behind no conv; bn1 also sees what goes by on the shortcut, so stem's zeros count.
        (PreActivation(), {"stem": "bn1", "conv1": "bn2", "conv2": None}),
        (ReluBetween(), {"0": "2"}),
    ],
)
def test_a_sample_shows_which_norm_follows_which_conv(net, wanted):
    before, mode = copy.deepcopy(net.state_dict()), net.training
    state = torch.get_rng_state()
    for sample in (IMAGES, (IMAGES,)):
        with torch.no_grad():
            assert norms(net, sample=sample) == wanted
    assert torch.equal(state, torch.get_rng_state()) and net.training == mode
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_channels_that_a_sample_has_wired_are_off():
    net = ReluBetween()
    opt, scheme = scheme_of(net, sample=IMAGES)
    train(net, opt)
    scheme.drop()
    train(net, opt)
    assert largest_dropped(scheme) == 0
    with torch.no_grad():
        assert not net[2](net[1](net[0](IMAGES)))[:, scheme.masks["0"]].any()


def test_what_the_sample_does_not_reach_goes_by_its_place():
    class Heads(nn.ModuleDict):
        def forward(self, x):
            return self["a"](x)

    net = Heads({n: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)) for n in "ab"})
    assert norms(net, sample=IMAGES) == {"a.0": "a.1", "b.0": "b.1"}


def test_named_norms_come_before_the_sample():
    net = Net(OUT_OF_ORDER)
    assert norms(net, sample=IMAGES, norms={"conv2": None}) == {"conv1": "bn1", "conv2": None}


@pytest.mark.parametrize(
    ("net", "conv"), [(Net(OUT_OF_ORDER), "conv2"), (Net("conv1 bn2 conv2 bn1"), "conv1"), (PreActivation(), "conv1")]
)
def test_a_wrong_guess_is_refused_at_the_first_drop(net, conv):
    opt, scheme = scheme_of(net)
    train(net, opt)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=rf"the norm that stands behind {conv} in its parent module is not the one"):
        scheme.drop()
    assert not scheme.is_sub
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Lists(nn.Module):
    """Convs and norms in lists of their own, which the forward pass goes through together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(width, 16, 3, padding=1) for width in (3, 16))
        self.bns = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = F.relu(bn(conv(x)))
        return self.fc(x.mean((2, 3)))


class Wider(nn.Module):
    """No norm stands right behind a conv of its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class TwoNorms(nn.Module):
    """One conv that is called twice, with a norm for each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(sum(norm(self.conv(x)).relu().mean((2, 3)) for norm in (self.first, self.second)))


@pytest.mark.parametrize(
    ("net", "conv", "norm"),
    [
        (Lists(), "convs.0", "bns.0"),
        (Wider(), "conv1", "bn1"),
        (ReluBetween(), "0", "2"),
        (TwoNorms(), "conv", "second"),
    ],
)
def test_a_norm_that_was_not_found_is_refused_after_the_first_step(net, conv, norm):
    """Its channels would go on putting out what the norm makes of zeros."""
    before = copy.deepcopy(net.state_dict())
    one = RePr(net, torch.optim.SGD(net.parameters(), 0.1), 20)
    with pytest.raises(UserError, match=rf"the output of {conv} goes through {norm}, which was not taken for its norm"):
        train(net, torch.optim.SGD(net.parameters(), 0.0), steps=1)
        one.step()
    assert one.phase == "full" and one.steps == 1
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items() if "weight" in name)


def test_a_norm_of_another_block_is_told(caplog):
    """Behind the stem of a network with norms before the convs; the shortcut reads it too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return x + self.conv1(F.relu(self.bn1(x)))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Block(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(16, 4))
    said = "the output of 0 goes through 1.bn1, which was not taken for its norm"
    for options, times in (({}, 1), ({"norms": {"0": None}}, 0)):  # the second says that there is none
        opt = torch.optim.SGD(net.parameters(), 0.1)
        one = RePr(net, opt, 20, **options)
        for _ in range(20):
            train(net, opt, steps=1)
            one.step()
        assert one.scheme.cycle == 3 and caplog.text.count(said) == times
        caplog.clear()


def test_convs_that_never_ran_do_not_keep_a_model_from_being_scripted():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.extra, self.extra_bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
            self.conv, self.bn, self.fc = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

    net = Unused()
    opt, scheme = scheme_of(net)
    train(net, opt)
    scheme.drop()
    scheme.restore()
    scripted = torch.jit.script(net.eval())
    torch.testing.assert_close(scripted(IMAGES), net(IMAGES))


def test_a_wrong_guess_is_refused_at_the_restore_where_no_pass_came_before_the_drop():
    net = Net(OUT_OF_ORDER)
    opt, scheme = scheme_of(net)
    scheme.drop()
    train(net, opt)
    with pytest.raises(UserError, match="conv2"):
        scheme.restore()


def test_without_the_watch_the_rows_tell():
    """What moves although it should be zero is found whatever the reason."""
    net = Net(OUT_OF_ORDER)
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), opt, drop_ratio=0.5)
    scheme._wiring.stop()
    train(net, opt)
    scheme.drop()
    train(net, opt, steps=5)
    with pytest.raises(UserError, match=r"dropped filters of conv2 are not zero any more at the restore of cycle 1"):
        scheme.restore()


class Levels(nn.Module):
    """A head: one conv and norm over several levels, and evaluation or a checkpointed pass before the first step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Linear(16, 4)

    def forward(self, x):
        levels = [self.conv(x[..., ::step]) for step in (1, 2)]
        return self.fc(sum(self.norm(level).relu().mean((2, 3)) for level in levels))


@pytest.mark.parametrize("net", [Levels(), Net("conv1 bn1 conv2 bn2"), ReluBetween()])
def test_right_guesses_are_not_disturbed(net):
    opt, scheme = scheme_of(net)
    with torch.no_grad():
        net.eval()(IMAGES)
    net.train()
    torch.utils.checkpoint.checkpoint(net, IMAGES, use_reentrant=False).sum().backward()
    train(net, opt)
    scheme.drop()
    train(net, opt)
    scheme.restore()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_copies_of_a_model_that_is_watched_are_not():
    net = Net(OUT_OF_ORDER)
    scheme = scheme_of(net)[1]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(IMAGES), copy.deepcopy(twin)(IMAGES))
    scheme.drop()  # nothing has been seen of the model itself


def test_the_one_object_takes_a_sample_and_several_optimizers():
    net = Net(OUT_OF_ORDER)
    convs = [net.conv1.weight, net.conv1.bias, net.conv2.weight, net.conv2.bias]
    rest = [p for p in net.parameters() if not any(p is conv for conv in convs)]
    optimizers = [torch.optim.SGD(convs, 0.1), torch.optim.Adam(rest, 0.01)]
    repr_training = RePr(net, optimizers, 20, sample=IMAGES)
    for _ in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), LABELS).backward()
        for optimizer in optimizers:
            optimizer.step()
        repr_training.step()
        if repr_training.phase == "sub":
            assert largest_dropped(repr_training.scheme) == 0
    assert repr_training.scheme.cycle == 3
