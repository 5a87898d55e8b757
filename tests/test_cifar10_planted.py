"""The control of examples/cifar10.py: filters that begin redundant."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cifar import network, training
from cifar_study import settings, tiny_feed
from torch import Tensor, nn

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def feed() -> training.Feed:
    return tiny_feed()


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.arange(6)).backward()
        optimizer.step()


def of_first_filters(model: nn.Sequential, keep: int) -> nn.Sequential:
    """The network of the first ``keep`` filters of every conv, by slicing."""
    narrow = copy.deepcopy(model)
    for index, conv in enumerate(network.convs(narrow)):
        conv.weight = nn.Parameter(conv.weight[:keep] if index == 0 else conv.weight[:keep, :keep])
        conv.bias = nn.Parameter(conv.bias[:keep])
    narrow[-1].weight = nn.Parameter(narrow[-1].weight[:, : keep * 4 * 4])
    return narrow


def filters(model: nn.Module) -> list[Tensor]:
    """A row a filter, its bias last."""
    return [torch.cat([c.weight.detach().flatten(1), c.bias.detach()[:, None]], 1) for c in network.convs(model)]


@pytest.mark.parametrize("kind", network.NETWORKS)
@pytest.mark.parametrize(("share", "keep"), [(0.5, 16), (0.75, 8), (0.3, 23)])
def test_copies_change_nothing_and_descent_does_not_part_them(kind, share, keep):
    torch.manual_seed(0)
    model = network.build(kind)
    narrow, before = of_first_filters(model, keep), filters(model)
    network.plant(model, duplicates=share)
    torch.testing.assert_close(model(IMAGES), narrow(IMAGES), rtol=1e-4, atol=1e-6)
    train(model, 3)
    for now, old in zip(filters(model), before, strict=True):
        assert not torch.equal(now[:keep], old[:keep])
        torch.testing.assert_close(now[keep:], now[torch.arange(keep, 32) % keep], rtol=0, atol=1e-6)


def test_dead_filters_are_the_networks_without_them_and_stay():
    torch.manual_seed(0)
    model = network.build()
    narrow, before = of_first_filters(model, 24), filters(model)
    network.plant(model, dead=0.25)
    torch.testing.assert_close(model(IMAGES), narrow(IMAGES), rtol=1e-4, atol=1e-6)
    train(model, 3)
    for now, old in zip(filters(model), before, strict=True):
        assert torch.equal(now[24:, :-1], old[24:, :-1]) and not torch.equal(now[:24], old[:24])


@pytest.mark.parametrize("planted", ["duplicates", "dead"])
def test_a_run_begins_with_what_was_asked_for_and_repr_parts_it(feed, planted):
    plain, _ = training.train(settings(**{planted: 0.5}), feed)
    new, record = training.train(settings(row="ortho", **{planted: 0.5}), feed)
    for index, (stays, parted) in enumerate(zip(filters(plain), filters(new), strict=True)):
        dropped = {row for event in record["events"] for row in event["dropped"].get(str(3 * index), ())}
        for row in range(16, 32):
            if planted == "dead":
                assert stays[row, -1] == -1e3 and (parted[row, -1] > -1) == (row in dropped)
            else:
                torch.testing.assert_close(stays[row], stays[row - 16], rtol=0, atol=1e-4)
                assert (parted[row] - parted[row - 16]).abs().max() > 1e-2 or not {row, row - 16} & dropped
    assert any(event["dropped"] for event in record["events"])


def test_nothing_planted_is_the_plain_network(feed):
    plain = training.train(settings(), feed)[1]["loss_curve"]
    for share in ({"duplicates": 0.01}, {"dead": 0.01}):  # less than one filter of 32
        assert training.train(settings(**share), feed)[1]["loss_curve"] == plain
