"""How filters return: without changing what the network puts out, or as published."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from gpu_nets import Loop
from gpu_nets import Net as GroupedNet
from small_loop import config, small_trainer
from small_loop import train as train_hooked
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from traced_nets import Net, calling

from repr_det import RePrHook
from repr_det.method.layers import find_filter_layers
from repr_det.method.passes import TrainingPasses
from repr_det.method.returning import aligned_readers
from repr_det.method.scheme import RePrScheme

FROZEN = torchvision.ops.FrozenBatchNorm2d
SAME, ALMOST = 1e-12, 1e-6  # kernels of 0 change nothing; a gamma of 1e-7 what float32 rounds away


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
        if isinstance(module, FROZEN):
            module.weight.uniform_(0.5, 1.5), module.bias.normal_(0, 0.2)
    return net


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


def images_of(number: int) -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def step(model, optimizer, scheme, number=0):
    optimizer.zero_grad()
    model(images_of(number)).square().mean().backward()
    optimizer.step()
    scheme.check()


def in_sub_network(model, layers=("[34].conv*",), kind=torch.optim.SGD, **options):
    """A scheme in the sub-network phase after some steps, so that momentum is there to be dealt with."""
    optimizer = kind(model.parameters(), 0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    options = {"frozen_norm": "keep", "max_drop_per_layer": 0.3, "returns": "function_preserving", **options}
    scheme = RePrScheme(find_filter_layers(model, layers), optimizer, model=model, **options)
    for number in range(4):
        step(model, optimizer, scheme, number)
        if number == 1:
            scheme.drop()
    return optimizer, scheme


def outputs(model):
    """Outputs in training and in evaluation mode, of copies: training moves running statistics."""
    with torch.no_grad():
        return [copy.deepcopy(model).train(mode)(images_of(0)) for mode in (True, False)]


def largest_change(model, before) -> float:
    pairs = zip(outputs(model), before, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("build", [BasicBlock, Bottleneck])
def test_function_preserving_restore_changes_no_output_and_everything_learns(build):
    model = resnet(build)
    optimizer, scheme = in_sub_network(model)
    dropped = {layer: mask for layer in scheme.layers if (mask := scheme.masks[layer.name].clone()).any()}
    columns = [
        (optimizer.state[reader.weight]["momentum_buffer"], mask)
        for layer, mask in dropped.items()
        for reader in aligned_readers(layer, scheme.participants.modules)[0]
        if isinstance(reader, nn.Conv2d)
    ]
    assert any(buffer[:, mask].any() for buffer, mask in columns)
    before = outputs(model)
    scheme.restore()
    assert largest_change(model, before) <= ALMOST
    assert not any(buffer[:, mask].any() for buffer, mask in columns)
    restored = {layer: layer.weight[mask].clone() for layer, mask in dropped.items()}
    assert all((rows.flatten(1).norm(dim=1) > 0).all() for rows in restored.values())
    for _ in range(5):
        step(model, optimizer, scheme)
    assert largest_change(model, before) > 1e-6
    for layer, rows in restored.items():
        moved = (layer.weight[dropped[layer]] - rows).flatten(1).abs().amax(1)
        assert (moved > 0).all(), layer.name  # every filter gets a gradient: none is dead


@pytest.mark.parametrize("norm", [FROZEN, group_norm, nn.Identity])
def test_function_preserving_with_other_norms(norm, caplog):
    """conv1 and conv2 of a bottleneck are read by convs alone; conv3 is added to the shortcut: where its norm has no
    gamma to learn it returns as published. A returned channel enters the statistics of its group, which block 4 has
    two channels in."""
    model = resnet(Bottleneck, norm)
    _, scheme = in_sub_network(model, ["[34].conv[12]"])
    named = ["4.conv1", "4.conv2"] if norm is group_norm else []
    assert scheme.not_silent == named and (f"filters of {', '.join(named)} cannot return" in caplog.text) == bool(named)
    before = outputs(model)
    scheme.restore()
    assert (largest_change(model, before) > SAME) == bool(named)


def test_what_cannot_be_silent_is_named_and_returns_as_published(caplog):
    """Convs of a frozen norm, added to a shortcut: no kernels of their own, no gamma to learn."""
    model = resnet(BasicBlock, FROZEN)
    _, scheme = in_sub_network(model)
    assert scheme.not_silent == ["3.conv2", "4.conv2"]
    assert caplog.text.count("filters of 3.conv2, 4.conv2 cannot return without changing the network's output") == 1
    before = outputs(model)
    scheme.restore()
    assert largest_change(model, before) > 1e-6


POOLED = nn.AdaptiveAvgPool2d(1), nn.Flatten()


@pytest.mark.parametrize(
    ("behind", "silent"),
    [
        ([nn.ReLU(), *POOLED, nn.Linear(16, 3)], True),
        ([nn.ReLU(), nn.Flatten(), nn.Linear(16 * 256, 3)], True),
        # Kernels that read other channels too stay, and gamma makes it silent.
        ([nn.BatchNorm2d(16), calling(lambda x: x - x.mean(1, keepdim=True)), nn.Conv2d(16, 4, 1), *POOLED], False),
        ([nn.BatchNorm2d(16), *POOLED, calling(lambda x: x - x.mean(-1, keepdim=True)), nn.Linear(16, 3)], False),
        ([nn.BatchNorm2d(16), calling(lambda x: x.flip(1)), nn.Conv2d(16, 4, 1), *POOLED], False),
    ],
    ids=["mean", "flatten", "less the mean", "less the last mean", "flip"],
)
def test_other_readers_of_a_conv(behind, silent):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *behind).double()
    optimizer, scheme = in_sub_network(net, ["0"])
    mask = scheme.masks["0"].clone()
    before = outputs(net)
    scheme.restore()
    assert largest_change(net, before) <= (SAME if silent else ALMOST) and not scheme.not_silent
    reader = [module for module in net if hasattr(module, "weight")][-1].weight
    columns = reader.flatten(1).view(len(reader), 16, -1)
    assert columns[:, mask].any() != silent
    step(net, optimizer, scheme)
    assert not silent or columns.any(2)[:, mask].all()


@pytest.mark.parametrize("frozen_norm", ["recalibrate", "keep"])
def test_a_gamma_silences_a_channel_of_bn_in_eval_mode_too(frozen_norm):
    """It does not keep its old beta, nor get the old moments: its input is normalised, from which gamma learns."""
    net = resnet()
    passes = TrainingPasses(net, lambda n, _: [images_of(3)] * n, lambda batch: net(batch).square().mean())
    with torch.no_grad():
        net(images_of(3))  # statistics to evaluate with
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().bias.normal_()
    _, scheme = in_sub_network(net, ["[34].conv2"], passes=passes, frozen_norm=frozen_norm)
    masks, before = dict(scheme.masks), outputs(net)
    scheme.restore()
    assert largest_change(net, before) <= ALMOST and not scheme.not_silent
    seen = {}
    for name in masks:
        norm = net.get_submodule(name.replace("conv", "bn"))
        norm.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: (module, inputs[0])}))
    net(images_of(3))
    for name, (norm, found) in seen.items() if frozen_norm == "recalibrate" else ():
        rows = ((found.transpose(0, 1).flatten(1).T - norm.running_mean) / norm.running_var.sqrt()).T[masks[name]]
        torch.testing.assert_close(rows.std(1, correction=0), torch.ones(len(rows)).double(), rtol=0, atol=1e-3)
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)).double(), rtol=0, atol=1e-3)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Adapted(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + torch.nn.functional.conv2d(x, 0.1 * self.weight.detach().cos(), padding=1)


class Shared(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(torch.ones_like(x))


@pytest.mark.parametrize("how", ["weight norm", "module", Standardised, Adapted, Shared])
def test_a_reader_whose_kernels_cannot_be_set_leaves_it_to_gamma(how):
    model = resnet()
    block = model[3]
    if how == "module":
        block.conv2 = nn.Sequential(block.conv2, nn.Dropout2d(0.1))
    elif how == "weight norm":
        nn.utils.parametrizations.weight_norm(block.conv2)
    else:
        block.conv2 = how(32, 32, 3, padding=1, bias=False).double()
    optimizer, scheme = in_sub_network(model, ["3.conv1"])
    assert scheme.not_silent == []
    mask, before, kernels = scheme.masks["3.conv1"].clone(), outputs(model), [*block.conv2.parameters()][-1].clone()
    scheme.restore()
    gamma = block.bn1.weight[mask].detach()
    if how == "module":
        assert (gamma == 1).all()
        return
    assert (gamma < ALMOST).all() and largest_change(model, before) <= ALMOST
    assert kernels.equal([*block.conv2.parameters()][-1])
    step(model, optimizer, scheme)
    assert (block.bn1.weight[mask] != gamma).all()


def test_what_is_closed_behind_a_frozen_norm_does_not_return_closed():
    net = resnet()
    passes = TrainingPasses(net, lambda n, _: [images_of(3)] * n, lambda batch: net(batch).square().mean())
    closed = net[3].bn1
    with torch.no_grad():
        net(images_of(3))  # statistics to evaluate with
        closed.bias[[1, 6]] = -100.0
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    options = {"criterion": "redundant", "passes": passes, "frozen_norm": "recalibrate", "max_drop_per_layer": 0.5}
    _, scheme = in_sub_network(net, ["3.conv*"], **options)
    assert scheme.masks["3.conv1"][[1, 6]].all()
    before = outputs(net)
    scheme.restore()
    assert largest_change(net, before) <= SAME
    seen = []
    closed.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    net(images_of(3))
    assert (seen[0][:, [1, 6]] > 0).any((0, 2, 3)).all()


def test_a_filter_returns_whole_also_where_it_reads_channels_that_return():
    """Kept and old filters have no weights on channels that were silent, so new ones may lie there alone."""
    loop = Loop(GroupedNet(), criterion="random", returns="function_preserving")
    for _ in range(24):
        masks = dict(loop.training.scheme.masks)
        done, _ = loop.step()
        for layer in loop.training.scheme.layers if done is not None and done.event == "restore" else ():
            sizes = layer.weight.detach().flatten(1).norm(dim=1)
            new, kept = sizes[masks[layer.name]], sizes[~masks[layer.name]]
            assert torch.allclose(new, kept.mean().expand_as(new), rtol=0.3), layer.name
    loop.assert_two_cycles()


def block(net, x):
    out = net.bn1(net.conv1(x)).relu()
    out = net.bn2(net.conv2(out)).relu()
    return (x + net.bn3(net.conv3(out))).relu()


def grouped(groups, norm=nn.BatchNorm2d) -> Net:
    torch.manual_seed(0)
    convs = {"conv1": nn.Conv2d(3, 32, 1, bias=False), "conv3": nn.Conv2d(32, 3, 1, bias=False)}
    convs["conv2"] = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    return Net(block, **convs, bn1=norm(32), bn2=norm(32), bn3=norm(3)).double()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU])
def test_a_channel_that_gamma_silences_learns_behind_any_activation(activation):
    """Two convs are added, and some channels return in both."""
    torch.manual_seed(0)
    act = activation()

    def forward(net, x):
        x = act(net.bn0(net.conv0(x)))
        return act(net.bn1(net.conv1(x)) + net.bn2(net.conv2(x)))

    convs = {f"conv{number}": nn.Conv2d(16 if number else 3, 16, 1) for number in range(3)}
    body = Net(forward, **convs, **{f"bn{number}": nn.BatchNorm2d(16) for number in range(3)})
    net = nn.Sequential(body, nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    optimizer, scheme = in_sub_network(net, ["0.conv[12]"], max_drop_per_layer=0.5, drop_ratio=0.5)
    masks, before = dict(scheme.masks), outputs(net)
    assert torch.logical_and(*masks.values()).any()
    scheme.restore()
    assert largest_change(net, before) <= ALMOST and not scheme.not_silent
    gammas = [body.get_parameter(f"bn{name[-1]}.weight") for name in masks]
    silent = [gamma.detach().clone() for gamma in gammas]
    for number in range(3):
        step(net, optimizer, scheme, number)
    for gamma, before, mask in zip(gammas, silent, masks.values(), strict=True):
        assert (gamma != before)[mask].all()


@pytest.mark.parametrize("how", ["in no optimizer", "rate 0"])
def test_kernels_that_no_optimizer_moves_stay(how):
    net = resnet()
    moved = [parameter for name, parameter in net.named_parameters() if not name.startswith("7")]
    groups = [{"params": moved}] + [{"params": net[7].parameters(), "lr": 0.0}] * (how == "rate 0")
    optimizer = torch.optim.SGD(groups, 0.01)
    fixed = copy.deepcopy(net[7].state_dict())
    scheme = RePrScheme(find_filter_layers(net, ["4.conv2"]), optimizer, model=net, returns="function_preserving")
    for number in range(4):
        step(net, optimizer, scheme, number)
        if number in (1, 3):
            (scheme.drop if number == 1 else scheme.restore)()
    torch.testing.assert_close(net[7].state_dict(), fixed, rtol=0, atol=0)


def test_a_reader_that_first_runs_while_filters_are_out_changes_nothing_either():
    def forward(net, x):
        x = net.conv(x).relu()
        return (net.first(x) + net.late(x) if net.both else net.first(x)).mean((2, 3))

    torch.manual_seed(0)
    net = Net(forward, conv=nn.Conv2d(3, 16, 3), first=nn.Conv2d(16, 3, 1), late=nn.Conv2d(16, 3, 1)).double()
    net.both = False
    optimizer, scheme = in_sub_network(net, ["conv"])
    net.both = True
    for number in range(2):
        step(net, optimizer, scheme, number)
    before = outputs(net)
    scheme.restore()
    assert largest_change(net, before) <= SAME


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_a_restore_in_front_of_grouped_readers_changes_no_output(groups, caplog):
    """Those of a depthwise reader return as published: it has one kernel a channel, and a filter of nothing else."""
    net = grouped(groups)
    optimizer, scheme = in_sub_network(net, ["conv[12]"], torch.optim.Adam, criterion="random")
    masks, before = dict(scheme.masks), outputs(net)
    scheme.restore()
    assert (largest_change(net, before) <= SAME) == (groups < 32)
    assert ("filters of conv1 cannot return without" in caplog.text) == (groups == 32)
    assert (net.conv2.weight.flatten(1).norm(dim=1) > 0).all()
    size, state = 32 // groups, optimizer.state[net.conv2.weight]
    for channel in masks["conv1"].nonzero().flatten().tolist() if groups < 32 else ():
        kept = (torch.arange(32) // size == channel // size) & ~masks["conv2"]
        for tensor in (net.conv2.weight, state["exp_avg"]):
            assert not tensor[kept][:, channel % size].any()
        assert (state["exp_avg_sq"][kept][:, channel % size] > 0).all()


def test_a_depthwise_reader_of_a_conv_without_a_norm_is_named(caplog):
    assert in_sub_network(grouped(32, lambda channels: nn.Identity()), ["conv[12]"])[1].not_silent == ["conv1"]
    assert "filters of conv1 cannot return without changing the network's output" in caplog.text


def test_a_group_that_returns_whole_is_named(caplog):
    """Channels 2 and 3 are all that a filter of the reader sees; 4 is half of what another one sees."""

    def chosen(layer):
        return torch.tensor([0.0 if layer.name == "conv1" and i in (2, 3, 4) else -np.inf for i in range(32)])

    net = grouped(16)
    _, scheme = in_sub_network(net, ["conv[12]"], criterion=chosen)
    assert scheme.masks["conv1"].nonzero().flatten().tolist() == [2, 3, 4]
    scheme.restore()
    assert "RePr: 2 filters of conv1 return as published: all channels of a group" in caplog.text
    assert net.conv2.weight[2:4].flatten(1).norm(dim=1).min() > 0
    assert not net.conv2.weight[4:6, 0].any() and net.conv2.weight[4:6, 1].all()


@pytest.mark.parametrize(
    ("options", "reference", "length"),
    [
        ({}, 0, 0),
        ({"warmup_iters": -1}, 0, 3),  # as long as the filters were out
        ({"warmup_iters": -1, "s1_iters": 0, "s2_iters": 0}, 0, 10),  # derived phases
        ({"warmup_iters": 7}, 2, 14),
    ],
)
def test_length_of_the_warm_up(options, reference, length):
    cfg = config(120, **{"s1_iters": 6, "s2_iters": 3, "layers": ["backbone.conv*"], **options})
    cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    hook = RePrHook(cfg)
    train_hooked(small_trainer(hook, steps=240), stop=1)
    assert hook.repr.warmup_iters == length
