"""Grouped convs: filters of different groups look at different channels, overlap means something inside one only."""

import numpy as np
import pytest
import torch
from textbook import textbook_overlap
from torch import nn
from traced_nets import Net

from repr_det import RePrScheme, find_filter_layers
from repr_det.method.criteria import CRITERIA, Context

GROUPS, WIDTH = 4, 8


def grouped_conv(in_channels: int = 16) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, GROUPS * WIDTH, 3, padding=1, groups=GROUPS, bias=False)


@pytest.mark.parametrize("name", ["ortho", "ortho_calibrated", "ortho_released", "weight_norm"])
def test_a_criterion_sees_a_grouped_conv_as_one_layer_a_group(name):
    together = nn.Sequential(grouped_conv())
    apart = nn.ModuleDict({f"{g}": nn.Conv2d(16 // GROUPS, WIDTH, 3) for g in range(GROUPS)})
    for group, weight in enumerate(together[0].weight.data.chunk(GROUPS)):
        apart[f"{group}"].weight.data.copy_(weight)
    context = Context(torch.Generator())
    found = CRITERIA[name].score(find_filter_layers(together, ["*"]), context)["0"]
    wanted = torch.cat(list(CRITERIA[name].score(find_filter_layers(apart, ["*"]), context).values()))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("in_channels", [16, 64])  # 36 and 144 dimensions
@pytest.mark.parametrize("whole", [False, True], ids=["", "a whole group"])
def test_new_filters_avoid_those_of_their_group(in_channels, whole):
    net = nn.Sequential(grouped_conv(in_channels), nn.BatchNorm2d(GROUPS * WIDTH))

    def score(layer):
        return torch.arange(GROUPS * WIDTH) < WIDTH if whole else torch.rand(layer.num_filters, generator=generator)

    generator = torch.Generator().manual_seed(0)
    layers, optimizer = find_filter_layers(net, ["*"]), torch.optim.SGD(net.parameters(), 0.1)
    scheme = RePrScheme(layers, optimizer, criterion=lambda layer: score(layer).float(), drop_ratio=0.4)
    old = net[0].weight.detach().clone()
    scheme.drop()
    mask = scheme.masks["0"].numpy()
    assert mask[:WIDTH].all() or not whole
    transition = scheme.restore()
    new = net[0].weight.detach()
    largest = 0.0
    for before, now, returned in zip(old.chunk(GROUPS), new.chunk(GROUPS), np.split(mask, GROUPS), strict=True):
        before, now = (nn.functional.normalize(w.flatten(1).double()).numpy() for w in (before, now))
        cosines = np.abs(before @ now[returned].T)  # kept filters and the old values of the returned ones
        largest = max(largest, cosines.max(initial=0))
        gram = now[returned] @ now[returned].T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    assert transition.max_cosine["0"] == pytest.approx(largest, abs=1e-6) and largest < 1e-5
    np.testing.assert_allclose(transition.overlaps["0"], textbook_overlap(new, GROUPS), atol=2e-6)
    assert transition.overlap_after == pytest.approx(textbook_overlap(new, GROUPS).mean(), abs=1e-9)
    parts = zip(old.chunk(GROUPS), np.split(~mask, GROUPS), strict=True)
    before = np.concatenate([textbook_overlap(part[rows]) for part, rows in parts])
    assert transition.overlap_before == pytest.approx(before.mean(), abs=1e-6)
    kept = old[~mask].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(new[mask].flatten(1).norm(dim=1), kept.expand(int(mask.sum())))


def block(net, x):
    out = net.bn1(net.conv1(x)).relu()
    out = net.bn2(net.conv2(out)).relu()
    return (x + net.bn3(net.conv3(out))).relu()


def function_preserving(groups, criterion="random", norm=nn.BatchNorm2d):
    """conv2 is grouped."""
    torch.manual_seed(0)
    convs = {"conv1": nn.Conv2d(16, 32, 1, bias=False), "conv3": nn.Conv2d(32, 16, 1, bias=False)}
    convs["conv2"] = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    net = Net(block, **convs, bn1=norm(32), bn2=norm(32), bn3=norm(16))
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


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_a_restore_in_front_of_grouped_readers_changes_no_output(groups, caplog):
    """A depthwise reader leaves it to gamma: it has one kernel a channel, without it its own filter would be zero."""
    net, opt, scheme, images = function_preserving(groups)
    masks = {name: mask.clone() for name, mask in scheme.masks.items()}
    before = net(images)
    scheme.restore()
    torch.testing.assert_close(net(images), before, rtol=1e-5, atol=1e-6)
    assert not caplog.text and (net.conv2.weight.flatten(1).norm(dim=1) > 0).all()
    size, state = 32 // groups, opt.state[net.conv2.weight]
    assert net.bn1.weight[masks["conv1"]].any() == (groups < 32)
    for channel in masks["conv1"].nonzero().flatten().tolist() if groups < 32 else ():
        kept = (torch.arange(32) // size == channel // size) & ~masks["conv2"]
        for tensor in (net.conv2.weight, state["exp_avg"]):
            assert not tensor[kept][:, channel % size].any()
        assert (state["exp_avg_sq"][kept][:, channel % size] > 0).all()


def test_a_depthwise_reader_of_a_conv_without_a_norm_is_named(caplog):
    assert function_preserving(32, norm=lambda channels: nn.Identity())[2].loud == ["conv1"]
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
