"""The oracle of examples/criteria.py against copies of a network whose channels are switched off by hooks."""

import copy

import digits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from criteria import ablation, oracle
from scipy.stats import rankdata
from torch import nn

from repr_det import RePr, find_filter_layers
from repr_det.method.criteria import Context, get_criterion
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import random_state


def made(norm) -> tuple[nn.Sequential, TrainingPasses]:
    """A network with dropout in float64, and passes over batches of 3 images; the generator runs on."""
    torch.manual_seed(0)
    convs = nn.Conv2d(2, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 3, 3), norm(3), nn.ReLU()
    net = nn.Sequential(*convs, nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 3)).double()
    for parameter in (*net[1].parameters(), *net[4].parameters()):
        nn.init.normal_(parameter, 0.5, 0.3)
    images = torch.randn(4, 3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = lambda batch: F.cross_entropy(net(batch), torch.arange(3))  # noqa: E731
    return net, TrainingPasses(net, lambda number, cycle: list(images[cycle : cycle + number]), loss)


def loss_without(net: nn.Sequential, batches, name: str, channel: int, state) -> float:
    """The mean loss of a copy whose removed channel (-1: none) is 0 behind the norm."""
    twin = copy.deepcopy(net).train()
    keep = torch.arange(net[int(name)].out_channels) != channel
    twin[int(name) + 1].register_forward_hook(lambda _, __, out: out * keep.view(1, -1, 1, 1))
    torch.set_rng_state(state)
    return float(np.mean([F.cross_entropy(twin(x), torch.arange(3)).item() for x in batches]))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_ablation_is_the_increase_of_the_loss_and_leaves_no_trace(norm):
    net, passes = made(norm)
    layers, batches = find_filter_layers(net, ["*"]), passes.batches(2, 1)
    before, state, noted = copy.deepcopy(net.state_dict()), torch.get_rng_state(), str(random_state())
    scores = get_criterion(oracle).score(layers, Context(torch.Generator(), passes, 2, 1))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert str(random_state()) == noted
    for layer in layers:
        whole = loss_without(net, batches, layer.name, -1, state)
        expected = [whole - loss_without(net, batches, layer.name, i, state) for i in range(layer.num_filters)]
        np.testing.assert_allclose(scores[layer.name].numpy(), expected, atol=1e-12)


def test_correlation_is_spearmans():
    model, (_, held_out, _) = digits.c3_32(), digits.digits(500)
    found = digits.correlations(model, held_out, seed=3)
    passes, layers = digits.passes_over(model, held_out), find_filter_layers(model, ["*"])
    harm = np.concatenate([ablation(layer, passes, passes.batches(8, 0)) for layer in layers])
    norms = np.concatenate([layer.weight.detach().flatten(1).square().mean(1).numpy() for layer in layers])
    assert found["weight_norm"] == pytest.approx(-np.corrcoef(rankdata(norms), rankdata(-harm))[0, 1], abs=1e-6)
    assert "taylor" in found


def test_a_drop_by_the_oracle():
    net, passes = made(nn.Identity)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    repr_training = RePr(net, optimizer, 9, layers=["0"], criterion=oracle, passes=passes, num_cycles=1)
    expected = ablation(find_filter_layers(net, ["0"])[0], passes, passes.batches(8, 0)).argmin()
    passes.loss(passes.batches(1, 0)[0]).backward()
    assert repr_training.scheme.drop().dropped == {"0": [int(expected)]}
