"""How filters return: without changing what the network puts out, or as published."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from gpu_nets import BATCHES, Net, loss_of
from saliency import SALIENCY
from test_orthogonality import overlap_by_hand
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from repr_det import RePr
from repr_det.method.layers import find_filter_layers
from repr_det.method.passes import TrainingPasses
from repr_det.method.returning import aligned_readers
from repr_det.method.scheme import RePrScheme


def resnet(kind=BasicBlock, norm=nn.BatchNorm2d) -> nn.Sequential:
    """Two of torchvision's blocks, stem and classifier, in double precision, with the norms that ``norm`` makes."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 32, 3, padding=1, bias=False), norm(32), nn.ReLU()]
    shortcut = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2, bias=False), norm(64))
    width = 32 // kind.expansion
    first = kind(32, width, norm_layer=norm)
    second = kind(32, 2 * width, stride=2, downsample=shortcut, norm_layer=norm)
    net = nn.Sequential(*stem, first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)).double()
    for module in net.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)
    return net


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def trained_sub_network(build, norm, returns="function_preserving", layers=("[34].conv*",)):
    """A scheme in the sub-network phase after some steps, so that momentum is there to be dealt with."""
    model = resnet(build, norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    options = {"returns": returns, "frozen_norm": "keep", "max_drop_per_layer": 0.3}
    scheme = RePrScheme(find_filter_layers(model, layers), optimizer, model=model, **options)
    batches = torch.randn(4, 4, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for number, batch in enumerate(batches):
        step(model, optimizer, batch)
        scheme.check()
        if number == 1:
            scheme.drop()
    return model, optimizer, scheme, batches[0]


def outputs(model, batch):
    """Of training and of evaluation mode; of copies, for training moves running statistics."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(batch) for mode in (True, False)]


BUILDS = [BasicBlock, Bottleneck]


@pytest.mark.parametrize("build", BUILDS)
def test_function_preserving_restore_changes_no_output_and_everything_learns(build):
    model, optimizer, scheme, batch = trained_sub_network(build, nn.BatchNorm2d)
    dropped = {layer: mask for layer in scheme.layers if (mask := scheme.masks[layer.name].clone()).any()}
    readers = {layer: aligned_readers(layer, scheme.participants.modules) for layer in dropped}
    columns = [(reader, mask) for layer, mask in dropped.items() for reader in _convs(readers[layer])]
    momentum = [optimizer.state[reader.weight]["momentum_buffer"] for reader, _ in columns]
    assert any(buffer[:, mask].any() for buffer, (_, mask) in zip(momentum, columns, strict=True))
    before = outputs(model, batch)
    scheme.restore()
    for a, b in zip(outputs(model, batch), before, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    assert not any(buffer[:, mask].any() for buffer, (_, mask) in zip(momentum, columns, strict=True))
    restored = {layer: layer.weight[mask].clone() for layer, mask in dropped.items()}
    assert all((rows.flatten(1).norm(dim=1) > 0).all() for rows in restored.values())
    for _ in range(5):
        step(model, optimizer, batch)
    changed = outputs(model, batch)
    assert any((a - b).abs().max() > 1e-6 * b.abs().max() for a, b in zip(changed, before, strict=True))
    for layer, rows in restored.items():
        moved = (layer.weight[dropped[layer]] - rows).flatten(1).abs().amax(1)
        assert (moved > 0).all(), layer.name  # every filter gets a gradient: none is dead


def _convs(readers):
    found = readers[0] if isinstance(readers, tuple) else readers
    return [reader.module for reader in found or () if isinstance(reader.module, nn.Conv2d)]


@pytest.mark.parametrize("norm", [torchvision.ops.FrozenBatchNorm2d, group_norm, nn.Identity])
def test_function_preserving_with_other_norms(norm):
    """conv1 and conv2 of a bottleneck are read by convs alone; conv3 is added to the shortcut: where its norm has no
    gamma to learn it returns as published."""
    model, _, scheme, batch = trained_sub_network(Bottleneck, norm, layers=["[34].conv[12]"])
    assert not scheme.loud
    before = outputs(model, batch)
    scheme.restore()
    for a, b in zip(outputs(model, batch), before, strict=True):
        # GroupNorm sees the returned channels in its statistics, and is behind the kernels that read them.
        assert (a - b).abs().max() <= (1e-12 if norm is not group_norm else np.inf) * b.abs().max()


def test_what_cannot_be_silent_is_named_and_returns_as_published(caplog):
    """Convs of a frozen norm, added to a shortcut: no kernels of their own, no gamma to learn."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    model, _, scheme, batch = trained_sub_network(BasicBlock, frozen)
    loud = ["3.conv2", "4.conv2"]
    assert scheme.loud == loud
    assert caplog.text.count(f"filters of {', '.join(loud)} cannot return without changing the network's output") == 1
    before = outputs(model, batch)[1]
    scheme.restore()
    assert (outputs(model, batch)[1] - before).abs().max() > 1e-6 * before.abs().max()


@pytest.mark.parametrize("join", ["mean", "pool", "flatten"])
def test_linear_layers_that_read_a_conv_are_silent_too(join):
    torch.manual_seed(0)
    behind = {
        "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)],
        "pool": [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 3)],
        "flatten": [nn.Flatten(), nn.Linear(16 * 64, 3)],
    }[join]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *behind).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizer, model=net, returns="function_preserving")
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    step(net, optimizer, images)
    scheme.check()
    scheme.drop()
    step(net, optimizer, images)
    mask = scheme.masks["0"].clone()
    before = net(images)
    scheme.restore()
    torch.testing.assert_close(net(images), before, rtol=1e-12, atol=1e-12)
    span = net[-1].in_features // 16
    assert not net[-1].weight[:, mask.repeat_interleave(span)].any() and not scheme.loud
    step(net, optimizer, images)
    assert net[-1].weight.view(3, 16, span).any(2)[:, mask].all()


class Less(nn.Module):
    """The mean over channels taken off: a dropped channel still carries the others."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def test_kernels_that_read_other_channels_too_stay():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Less(), nn.Conv2d(16, 4, 1), nn.Flatten()).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheme = RePrScheme(find_filter_layers(net, ["0"]), optimizer, model=net, returns="function_preserving")
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    step(net, optimizer, images)
    scheme.check()
    scheme.drop()
    before = net(images)
    scheme.restore()
    torch.testing.assert_close(net(images), before, rtol=1e-12, atol=1e-12)


def reparametrised(block, how):
    if how == "weight norm":
        nn.utils.parametrizations.weight_norm(block.conv2)
    elif how == "spectral norm":
        nn.utils.parametrizations.spectral_norm(block.conv2)
    else:
        block.conv2 = nn.Sequential(block.conv2, nn.Dropout2d(0.1))


@pytest.mark.parametrize(("how", "by"), [("weight norm", "gamma"), ("spectral norm", "gamma"), ("module", "kernels")])
def test_a_reader_whose_kernels_cannot_be_set_leaves_it_to_gamma(how, by):
    model = resnet()
    reparametrised(model[3], how)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    layers = find_filter_layers(model, ["3.conv1"])
    scheme = RePrScheme(layers, optimizer, model=model, returns="function_preserving")
    step(model, optimizer, torch.randn(4, 3, 16, 16, dtype=torch.float64))
    scheme.check()
    assert scheme.loud == []
    scheme.drop()
    mask = scheme.masks["3.conv1"].clone()
    scheme.restore()
    gamma = model[3].bn1.weight[mask]
    assert (gamma == 0).all() if by == "gamma" else (gamma == 1).all()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("returns", ["as_published", "function_preserving"])
def test_overlaps_told_after_a_restore_are_those_of_the_weights(build, returns):
    _, _, scheme, _ = trained_sub_network(build, nn.BatchNorm2d, returns, ["[34].conv*"])
    kept = np.concatenate([overlap_by_hand(x.weight[~scheme.masks[x.name]]) for x in scheme.layers])
    transition = scheme.restore()
    expected = np.concatenate([overlap_by_hand(layer.weight) for layer in scheme.layers])
    told = np.concatenate([transition.overlaps[layer.name] for layer in scheme.layers])
    np.testing.assert_allclose(told, expected, atol=2e-6)  # told with 6 decimals
    assert transition.overlap_after == pytest.approx(expected.mean(), abs=1e-9)
    assert transition.overlap_before == pytest.approx(kept.mean(), abs=1e-9)


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_closed_behind_a_frozen_norm_does_not_return_closed(build):
    net = resnet(build)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    passes = TrainingPasses(net, lambda n, _: [images] * n, lambda batch: net(batch).square().mean())
    closed = net[3].bn1
    with torch.no_grad():
        net(images)  # statistics to evaluate with
        closed.bias[[1, 6]] = -100.0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    options = {"returns": "function_preserving", "criterion": "redundant", "passes": passes, "criterion_batches": 1}
    layers = find_filter_layers(net, ["3.conv*"])
    scheme = RePrScheme(layers, optimizer, model=net, calibration_batches=1, **options)
    passes.loss(images)
    scheme.check()
    assert {1, 6} <= set(scheme.drop().dropped["3.conv1"])
    step(net, optimizer, images)
    with torch.no_grad():
        before = net(images)
        scheme.restore()
        assert (net(images) - before).abs().max() <= 1e-12 * before.abs().max()
    seen = []
    closed.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    net(images)
    assert (seen[0][:, [1, 6]] > 0).any((0, 2, 3)).all()


def test_a_filter_returns_whole_also_where_it_reads_channels_that_return():
    """Kept and old filters have no weights on channels that were silent, so new ones may lie there alone."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    options = {"criterion": SALIENCY["gradient"], "returns": "function_preserving", "criterion_batches": 2}
    training = RePr(net, optimizer, 24, num_cycles=2, loader=BATCHES, loss=lambda batch: loss_of(net, batch), **options)
    for step in range(24):
        optimizer.zero_grad()
        loss_of(net, BATCHES[step % 4]).backward()
        optimizer.step()
        masks = dict(training.scheme.masks)
        done = training.step()
        if done is not None and done.event == "restore":
            for layer in training.scheme.layers:
                sizes = layer.weight.detach().flatten(1).norm(dim=1)
                new, kept = sizes[masks[layer.name]], sizes[~masks[layer.name]]
                assert torch.allclose(new, kept.mean().expand_as(new), rtol=0.3), layer.name
    assert training.scheme.cycle == 2
