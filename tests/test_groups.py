"""Grouped convs: filters of different groups look at different channels, overlap means something inside one only."""

import numpy as np
import pytest
import torch
from torch import nn

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.criteria import CRITERIA, Context
from repr_det.method.orthogonality import expected_overlap, inter_filter_orthogonality, overlap_of_kept

GROUPS, WIDTH = 4, 8


def overlaps_by_hand(filters: np.ndarray) -> np.ndarray:
    """O_f of filters (J, ...) by its definition, one pair at a time."""
    flat = filters.reshape(len(filters), -1).astype(np.float64)
    total = np.zeros(len(flat))
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            if i != j:
                total[i] += abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
    return total / max(len(flat), 1)


def in_groups(weight: torch.Tensor, keep: np.ndarray | None = None) -> np.ndarray:
    parts = np.split(weight.detach().numpy(), GROUPS)
    kept = [slice(None)] * GROUPS if keep is None else np.split(keep, GROUPS)
    return np.concatenate([overlaps_by_hand(part[rows]) for part, rows in zip(parts, kept, strict=True)])


def grouped_conv(in_channels: int = 16) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, GROUPS * WIDTH, 3, padding=1, groups=GROUPS, bias=False)


def test_overlap_is_that_inside_each_group():
    conv = grouped_conv()
    np.testing.assert_allclose(inter_filter_orthogonality(conv.weight, GROUPS), in_groups(conv.weight), atol=1e-6)
    dropped = torch.rand(GROUPS * WIDTH) < 0.4
    found = overlap_of_kept(conv.weight, dropped, GROUPS)
    np.testing.assert_allclose(found, in_groups(conv.weight, ~dropped.numpy()), atol=1e-6)


def test_filters_that_are_alike_in_different_groups_do_not_overlap():
    """The same kernels on other channels put out other things."""
    conv = nn.Conv2d(8, 8, 3, groups=8)
    conv.weight.data[:] = conv.weight.data[:1]
    assert not inter_filter_orthogonality(conv.weight, 8).any()
    assert inter_filter_orthogonality(conv.weight).min() > 0.8


@pytest.mark.parametrize("name", ["ortho", "ortho_calibrated", "ortho_released", "weight_norm"])
def test_a_criterion_sees_a_grouped_conv_as_one_layer_a_group(name):
    together = nn.Sequential(grouped_conv())
    apart = nn.ModuleDict({f"{g}": nn.Conv2d(16 // GROUPS, WIDTH, 3) for g in range(GROUPS)})
    for group in range(GROUPS):
        apart[f"{group}"].weight.data.copy_(together[0].weight.data[group * WIDTH : (group + 1) * WIDTH])
    context = Context(torch.Generator())
    found = CRITERIA[name].score(find_filter_layers(together, ["*"]), context)["0"]
    wanted = torch.cat(list(CRITERIA[name].score(find_filter_layers(apart, ["*"]), context).values()))
    torch.testing.assert_close(found, wanted)
    if name == "ortho_calibrated":
        torch.testing.assert_close(
            found, inter_filter_orthogonality(together[0].weight, GROUPS) / expected_overlap(WIDTH, 36)
        )


@pytest.mark.parametrize("in_channels", [16, 64])  # 36 and 144 dimensions
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_new_filters_avoid_those_of_their_group(in_channels, share):
    net = nn.Sequential(grouped_conv(in_channels), nn.BatchNorm2d(GROUPS * WIDTH))
    scheme = RePrScheme(
        find_filter_layers(net, ["*"]), torch.optim.SGD(net.parameters(), 0.1), criterion="random", drop_ratio=share
    )
    old = net[0].weight.detach().clone()
    scheme.drop()
    mask = scheme.masks["0"].numpy()
    transition = scheme.restore()
    new = net[0].weight.detach()
    largest = 0.0
    for group in range(GROUPS):
        rows = np.arange(group * WIDTH, (group + 1) * WIDTH)
        before, now = (w[rows].flatten(1).double().numpy() for w in (old, new))
        before, now = (w / np.linalg.norm(w, axis=1, keepdims=True) for w in (before, now))
        returned = mask[rows]
        cosines = np.abs(before @ now[returned].T)  # kept filters and the old values of the returned ones
        largest = max(largest, cosines.max(initial=0))
        assert cosines.max(initial=0) < 1e-5
        gram = now[returned] @ now[returned].T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert transition.max_cosine["0"] == pytest.approx(largest, abs=1e-6)
    np.testing.assert_allclose(transition.overlaps["0"], in_groups(new), atol=2e-6)
    assert transition.overlap_before == pytest.approx(in_groups(old, ~mask).mean(), abs=1e-6)
    kept = old[~mask].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(new[mask].flatten(1).norm(dim=1), kept.expand(int(mask.sum())))


def test_a_whole_group_may_be_dropped_and_returns():
    net = nn.Sequential(grouped_conv(), nn.BatchNorm2d(GROUPS * WIDTH))
    net[0].weight.data[:WIDTH] = net[0].weight.data[:1]
    scheme = RePrScheme(find_filter_layers(net, ["*"]), torch.optim.SGD(net.parameters(), 0.1))
    assert scheme.drop().dropped["0"][:WIDTH] == list(range(WIDTH))
    scheme.restore()
    first = net[0].weight.detach()[:WIDTH].flatten(1).double()
    first = first / first.norm(dim=1, keepdim=True)
    torch.testing.assert_close(first @ first.T, torch.eye(WIDTH).double(), atol=1e-5, rtol=0)


# --- returning in front of a grouped conv ---------------------------------------------------------------------------


class Block(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1 x)))))))) + x, conv2 grouped."""

    def __init__(self, groups: int, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 1, bias=False), norm(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False), norm(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 16, 1, bias=False), norm(16)

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (x + self.bn3(self.conv3(out))).relu()


def function_preserving(groups, criterion="random", norm=nn.BatchNorm2d):
    net = Block(groups, norm)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    layers = find_filter_layers(net, ["conv[12]"])
    scheme = RePrScheme(layers, opt, model=net, returns="function_preserving", criterion=criterion)
    images = torch.randn(4, 16, 6, 6)
    for number in range(6):
        opt.zero_grad()
        net(images).square().mean().backward()
        opt.step()
        scheme.check()
        if number == 2:
            scheme.drop()
    return net, opt, scheme, images


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_restore_in_front_of_grouped_readers_changes_no_output(groups, caplog):
    net, opt, scheme, images = function_preserving(groups)
    masks = {name: mask.clone() for name, mask in scheme.masks.items()}
    before = net(images)
    scheme.restore()
    torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-6)
    assert not caplog.text
    size, filters = 32 // groups, net.conv2.out_channels // groups
    for channel in masks["conv1"].nonzero().flatten().tolist():
        rows = torch.arange(32) // filters == channel // size
        kept = rows & ~masks["conv2"]
        for tensor in (net.conv2.weight, opt.state[net.conv2.weight]["exp_avg"]):
            assert not tensor[kept][:, channel % size].any()
        assert (opt.state[net.conv2.weight]["exp_avg_sq"][kept][:, channel % size] > 0).all()
    assert (net.conv2.weight.flatten(1).norm(dim=1) > 0).all()


def test_a_depthwise_reader_leaves_it_to_gamma_or_is_named(caplog):
    """It has one kernel a channel: without it its own filter would be zero."""
    net, _, scheme, images = function_preserving(32)
    mask = scheme.masks["conv1"].clone()
    before = net(images)
    scheme.restore()
    torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-6)
    assert not net.bn1.weight[mask].any() and (net.conv2.weight.flatten(1).norm(dim=1) > 0).all()
    assert not caplog.text
    net, _, scheme, _ = function_preserving(32, norm=lambda channels: nn.Identity())
    assert scheme.loud == ["conv1"]
    assert "filters of conv1 cannot return without changing the network's output" in caplog.text


def test_a_group_that_returns_whole_is_named(caplog):
    """Channels 2 and 3 are all that a filter of the reader sees; 4 is half of what another one sees."""

    def chosen(layer):
        score = torch.full((layer.num_filters,), float("-inf"))
        if layer.name == "conv1":
            score[2:5] = 1
        return score

    net, _, scheme, _ = function_preserving(16, criterion=chosen)
    assert scheme.masks["conv1"].nonzero().flatten().tolist() == [2, 3, 4]
    scheme.restore()
    assert "RePr: 2 filters of conv1 return as published: all channels of a group" in caplog.text
    assert net.conv2.weight[2:4].flatten(1).norm(dim=1).min() > 0
    assert not net.conv2.weight[4:6, 0].any() and net.conv2.weight[4:6, 1].all()
