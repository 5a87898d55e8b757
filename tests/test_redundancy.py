"""The criterion "redundant": which filters it finds, and that a run without any is the run without RePr."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_weights
from torch import nn
from torch.optim.swa_utils import AveragedModel
from traced_nets import IMAGES

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.criteria import Context, copies, redundancy, use_of_filters
from repr_det.method.passes import TrainingPasses


class Net(nn.Module):
    """A filter whose ReLU never opens, one that is below 0 but read behind a sum, a layer that does not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.summed = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.unread, self.never = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.summed(x) + 2 * x)
        x = F.relu(self.last(x))
        return self.dropout(x) + 0 * self.unread(x).sum()


def context_of(net: nn.Module) -> Context:
    passes = TrainingPasses(net, lambda number, cycle: [IMAGES] * number, lambda batch: net(batch).square().mean())
    return Context(torch.Generator(), passes, 2)


def scheme_of(net: nn.Module, optimizer: torch.optim.SGD, **options) -> RePrScheme:
    layers = find_filter_layers(net, ["*first", "*summed", "*last"])
    return RePrScheme(layers, optimizer, criterion="redundant", passes=context_of(net).passes, **options)


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (net(IMAGES) - 1).square().mean().backward()
    optimizer.step()


def test_a_filter_is_in_use_where_it_puts_out_something_or_learns():
    """The threshold is mean over deviation before the activation."""
    net = Net()
    with torch.no_grad():
        net.first.bias[2] = -100.0
        net.summed.bias[1] = -0.5
        net.summed.weight[1] *= 0.01  # always below 0, and what it is added to is mostly above
        net.last.weight[4] = net.last.bias[4] = 0.0
        net.unread.bias.fill_(-100.0)  # no gradient for any filter: perhaps there was no example
    found = use_of_filters(find_filter_layers(net, ["*"]), context_of(net))
    idle = {name: idle.nonzero().flatten().tolist() for name, (idle, _) in found.items()}
    assert idle == {"first": [2], "summed": [], "last": [4], "unread": [], "never": []}
    out = net.first(IMAGES).detach().double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(found["first"][1], out.mean(1) / out.std(1), rtol=1e-3)


def test_copies_are_what_a_loop_over_pairs_finds():
    draw = np.random.default_rng(0)
    for _ in range(50):
        distinct = draw.standard_normal((5, 8))
        origin = draw.integers(0, 5, 12)
        rows = distinct[origin] * draw.choice([-2, 1, 3], 12)[:, None] + 0.3 * draw.standard_normal((12, 8))
        idle = draw.random(12) < 0.2
        threshold = draw.choice([0.0, 0.1, 1.0], 12)

        def likeness(a, b, rows=rows, threshold=threshold):
            cosine = rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b])
            return cosine / np.hypot(1, threshold[a] - threshold[b])

        kept, wanted = [], np.full(12, -np.inf)
        for row in sorted(range(12), key=lambda row: -np.linalg.norm(rows[row])):
            alike = max([likeness(row, k) for k in kept], default=0)
            if not idle[row] and alike > 0.9:
                wanted[row] = alike
            elif not idle[row]:
                kept.append(row)
        weight = torch.tensor(1e-3 * rows).view(12, 2, 2, 2)
        found = copies(weight, torch.tensor(idle), torch.tensor(threshold)).numpy()
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
        for row in np.isfinite(wanted).nonzero()[0]:  # those that stay after it may be closer, but not from before
            assert found[row] >= wanted[row] - 1e-12


@pytest.mark.parametrize("kind", ["bias", "beta", "sign", "same", "no affine"])
def test_copies_are_those_whose_output_is_alike(kind):
    torch.manual_seed(0)
    norms = [] if kind == "bias" else [nn.BatchNorm2d(8, affine=kind != "no affine")]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=kind == "bias"), *norms, nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]
        if kind == "bias":  # relu(z + 0.5) and relu(z - 0.5)
            net[0].bias[0], net[0].bias[1] = 0.5, -0.5
        elif kind == "beta":
            net[1].bias[0], net[1].bias[1] = 1.0, -1.0
        elif kind != "no affine":  # relu(z) and relu(-z); or both opposite: the same output
            net[1].weight[1] = -1
            net[0].weight[1] *= 1 if kind == "sign" else -1
        out = net[:-1](IMAGES).transpose(0, 1).flatten(1)
    alike = torch.corrcoef(out[:2])[0, 1] > 0.9
    scores = redundancy(find_filter_layers(net, ["0"]), context_of(net))["0"]
    assert bool((scores[:2] > 0).any()) == bool(alike) == (kind in ("same", "no affine"))


def test_copies_and_dead_filters_go_and_come_back_as_something_else():
    net = Net()
    with torch.no_grad():
        net.first.weight[3], net.first.bias[3] = 1.5 * net.first.weight[0], 1.5 * net.first.bias[0]
        net.first.weight[5] = -net.first.weight[1]  # says something else behind the ReLU
        net.last.bias[2] = -100.0
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    scheme = scheme_of(net, optimizer)
    assert scheme.drop().dropped == {"first": [0], "last": [2]}
    train(net, optimizer)
    back = scheme.restore()
    assert max(back.max_cosine.values()) < 1e-5
    assert net.last.bias[2] == 0 and F.cosine_similarity(*net.first.weight[[0, 3]].flatten(1), dim=0).abs() < 1e-5
    assert scheme.drop().dropped == {}


def test_where_nothing_is_redundant_training_and_averages_are_those_without_repr():
    """The averages are of weights, and of statistics over all batches (BN of momentum None). The sub-network, which has
    no filter less, is saved and loaded."""
    ends = []
    for with_repr in (False, True):
        net = nn.Sequential(Net(), nn.BatchNorm2d(6, momentum=None))
        average = AveragedModel(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
        scheme = scheme_of(net, optimizer, model=net, averages=[average])
        for event in ("drop", "restore") * 2:
            train(net, optimizer)
            average.update_parameters(net)
            if with_repr:
                assert getattr(scheme, event)().dropped == {}
                state = scheme.state_dict()
                scheme.close()
                scheme = scheme_of(net, optimizer, model=net, averages=[average])
                scheme.load_state_dict(state)
                assert scheme.is_sub == (event == "drop") and scheme.num_dropped == 0
        train(net, optimizer)
        ends.append(average.state_dict() | net.state_dict())
    assert ends[0]["n_averaged"] == ends[1]["n_averaged"] == 4
    assert_same_weights(*ends)
