"""Dropped filters stay at zero whatever the training loop does, and where something moves them the restore says so."""

import copy
import gc
import weakref

import pytest
import torch
from plain_nets import IMAGES, largest_dropped, loss_of, plain_net, plain_scheme, readable_net, train
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_gradients_that_wait_at_the_drop_do_not_move_dropped_filters(optimizer):
    """Accumulation: the step after the drop sums gradients from before it."""
    net = plain_net(bias=True)
    opt = getattr(torch.optim, optimizer)(net.parameters(), 0.01)
    _, _, scheme = plain_scheme(net, opt)
    for micro_batch in range(12):
        (loss_of(net) / 4).backward()
        if micro_batch % 4 == 3:
            opt.step()
            opt.zero_grad()
        if micro_batch == 5:
            kept = {x.name: x.weight.grad.clone() for x in scheme.layers}
            scheme.drop()
            for layer in scheme.layers:
                mask = scheme.masks[layer.name]
                assert torch.equal(layer.weight.grad[~mask], kept[layer.name][~mask])
        if scheme.is_sub:
            assert largest_dropped(scheme) == 0
    saved = scheme.state_dict()
    scheme.load_state_dict(saved)
    scheme.restore()


def test_gradients_that_wait_when_a_state_is_loaded():
    net, opt, scheme = plain_scheme()
    train(net, opt)
    scheme.drop()
    saved = copy.deepcopy(scheme.state_dict())
    other = plain_scheme(net, opt)[2]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.load_state_dict(saved)
    opt.step()
    assert largest_dropped(other) == 0


class TwoReaders(nn.Module):
    """The first conv feeds its BN and, past it, something else: its gradient is not zero where gamma is."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.twice = twice

    def forward(self, x):
        raw = self.conv1(x)
        x = self.bn2(self.conv2(self.bn1(raw).relu()))
        return self.conv2(x.relu()) if self.twice else x + raw


@pytest.mark.parametrize("twice", [True, False], ids=["conv called twice", "conv read past its norm"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_convs_that_do_not_only_feed_their_norm(twice, optimizer):
    net = TwoReaders(twice)
    opt = getattr(torch.optim, optimizer)(net.parameters(), 0.01)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), opt)
    train(net, opt)
    scheme.drop()
    for _ in range(3):
        train(net, opt, steps=1)
        assert largest_dropped(scheme) == 0
    assert scheme.restore().event == "restore"


def moved_by_hand(net, scheme):
    layer = scheme.layers[1]
    layer.norm.bias.data[scheme.masks[layer.name]] += 1e-30


def moved_by_loading(net, scheme):
    net.load_state_dict(plain_net().state_dict())


@pytest.mark.parametrize(("move", "names"), [(moved_by_hand, "3"), (moved_by_loading, "0")])
def test_what_moved_dropped_filters_is_named_at_the_restore(move, names):
    net, opt, scheme = plain_scheme()
    train(net, opt)
    scheme.drop()
    move(net, scheme)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=rf"dropped filters of {names} are not zero any more at the restore of cycle 1"):
        scheme.restore()
    assert scheme.is_sub  # nothing was changed
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("tensor", ["weight", "norm.weight", "norm.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("transition", ["drop", "restore"])
def test_weights_that_are_not_finite_are_named(tensor, value, transition):
    net, opt, scheme = plain_scheme()
    train(net, opt)
    if transition == "restore":
        scheme.drop()
    layer = scheme.layers[1]
    kept = (~scheme.masks[layer.name]).nonzero()[0, 0] if scheme.masks else 2
    layer.tensors()[tensor].data[kept] = value
    with pytest.raises(UserError, match=rf"the {tensor} of 3 is not finite at the {transition} of cycle 1"):
        getattr(scheme, transition)()
    assert scheme.is_sub == (transition == "restore") and scheme.cycle == 0


def test_several_optimizers():
    """As one: conv weights and norms stepped by two optimizers of the same kind."""
    ends = []
    for apart in (True, False):
        net = plain_net()
        convs, norms = [net[0].weight, net[3].weight], [*net[1].parameters(), *net[4].parameters()]
        groups = [convs, norms] if apart else [[*convs, *norms]]
        optimizers = [torch.optim.SGD(group, 0.1, momentum=0.9, weight_decay=1e-2) for group in groups]
        scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizers if apart else optimizers[0])
        train(net, *optimizers)
        scheme.drop()
        train(net, *optimizers)
        assert largest_dropped(scheme) == 0
        scheme.restore()
        train(net, *optimizers)
        ends.append(net.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_members_that_no_optimizer_holds_are_refused_by_name():
    net = plain_net(bias=True)
    without = {"norm.weight": [0, 3], "weight": [1, 4]}
    for member, modules in without.items():
        optimizer = torch.optim.SGD([p for i in modules for p in net[i].parameters()], 0.1)
        with pytest.raises(UserError, match=rf"does not hold the {member} of 0, .* all optimizers \(a list\)"):
            RePrScheme(find_filter_layers(net, ["*"]), optimizer)
    for norm in (net[1], net[4]):  # what does not train may be held by none
        norm.requires_grad_(False)
    RePrScheme(find_filter_layers(net, ["*"]), torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1))


class Factored(torch.optim.SGD):
    """State by rows and columns, under a name that nobody knows."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["row_var"] = torch.zeros(len(parameter))
        return super().step(closure)


class Quantised(torch.optim.SGD):
    """State of 8 bits, of which 0 is not the number 0."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["state1"] = torch.zeros(parameter.shape, dtype=torch.uint8)
        return super().step(closure)


class SecondCopy(torch.optim.SGD):
    """State of the weight's shape, of a name that nobody knows."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow"] = parameter.detach().clone()
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Factored, "filters of 0 cannot be held at zero under the optimizer Factored: it keeps 'row_var'"),
        (Quantised, "under the optimizer Quantised: it keeps 'state1' for every weight"),
        (SecondCopy, "under the optimizer SecondCopy: it keeps 'slow' for every weight"),
        (torch.optim.Adafactor, "under the optimizer Adafactor: it keeps 'row_var' for every weight"),
        (torch.optim.LBFGS, "the optimizer LBFGS keeps '.*' for all weights together"),
    ],
)
def test_optimizers_whose_state_is_not_understood_are_refused_before_the_drop(kind, told):
    net = plain_net()
    opt = kind(net.parameters(), lr=0.1)
    _, _, scheme = plain_scheme(net, opt)

    def closure():
        opt.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        opt.step(closure if kind is torch.optim.LBFGS else None)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=told):
        scheme.drop()
    assert not scheme.is_sub and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", ["Adam", "RMSprop", "Adagrad"])
def test_eps_0_is_refused_at_once(kind):
    net = plain_net()
    with pytest.raises(UserError, match=f"the optimizer {kind} has eps 0: its step of a dropped filter is 0 / 0"):
        plain_scheme(net, getattr(torch.optim, kind)(net.parameters(), 0.1, eps=0.0))


# --- layers that do not learn ---------------------------------------------------------------------------------------


def dropped_layers(scheme, net, opt, steps=2):
    train(net, opt, steps=steps)
    return set(scheme.drop().dropped)


def test_layers_with_learning_rate_0_lose_no_filter(caplog):
    net = plain_net()
    groups = [{"params": [*net[0].parameters(), *net[1].parameters()], "lr": 0.0}, {"params": net[3:].parameters()}]
    _, opt, scheme = plain_scheme(net, torch.optim.SGD(groups, 0.1))
    assert dropped_layers(scheme, net, opt) == {"3"}
    assert scheme.num_dropped == 4  # floor(0.3 * 16)
    assert "no filter is dropped of 0 (its learning rate is 0)" in caplog.text
    scheme.restore()


def test_a_warm_up_from_0_is_not_a_frozen_network():
    net = plain_net()
    _, opt, scheme = plain_scheme(net, torch.optim.SGD(net.parameters(), 0.0))
    assert dropped_layers(scheme, net, opt) == {"0", "3"}


class TwoBranches(nn.Module):
    """A second conv that never runs, one of which the loss knows nothing, and one whose loss weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.main = plain_net()
        self.idle, self.unused, self.weightless = (nn.Conv2d(3, 16, 3, padding=1) for _ in range(3))

    def forward(self, x):
        self.unused(x)
        return self.main(x) + 0 * self.weightless(x)


def test_layers_without_a_gradient_lose_no_filter_also_when_resumed(caplog):
    torch.manual_seed(0)
    net = TwoBranches()
    _, opt, scheme = plain_scheme(net)
    for steps in (4, 1):
        assert not dropped_layers(scheme, net, opt, steps) & {"idle", "unused"}
        assert "no filter is dropped of idle (it has had no gradient), unused (it has had no gradient)" in caplog.text
        scheme.restore()
        saved = scheme.state_dict()
        scheme = plain_scheme(net, opt)[2]
        scheme.load_state_dict(saved)


def test_where_no_layer_learns_nothing_is_dropped():
    net, opt, scheme = plain_scheme()
    train(net, opt)
    for layer in scheme.layers:
        layer.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"no layer learns \(of 0: it does not require a gradient\)"):
        scheme.drop()
    assert not scheme.is_sub


def test_layers_that_were_frozen_after_the_start_lose_no_filter():
    net, opt, scheme = plain_scheme()
    train(net, opt)
    net[0].weight.requires_grad_(False)
    assert dropped_layers(scheme, net, opt) == {"3"}


# --- what returns ---------------------------------------------------------------------------------------------------


def test_filters_that_are_zero_go_first_and_return_alive():
    """A sub-network checkpoint as the start: O_f of a zero filter is 0, the best there is."""
    net = plain_net()
    net[0].weight.data[8:] = 0
    net[0].weight.data[:8] = net[0].weight.data[:1]  # those that are left are all alike
    _, _, scheme = plain_scheme(net)
    assert scheme.drop().dropped["0"] == list(range(8, 16))
    scheme.restore()
    norms = net[0].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(16))


@pytest.mark.parametrize("scale", ["kept", "old", "unit"])
@pytest.mark.parametrize("zero", ["one kept filter", "all kept filters", "all filters"])
def test_a_restored_filter_never_has_norm_0(scale, zero):
    net, _, scheme = plain_scheme(scale=scale)
    if zero == "all filters":
        net[0].weight.data.zero_()
    scheme.drop()
    mask = scheme.masks["0"]
    kept = (~mask).nonzero().flatten()
    net[0].weight.data[kept if zero.startswith("all") else kept[:1]] = 0
    norms = net[0].weight.detach().flatten(1).norm(dim=1)
    old = scheme.state_dict()["old"]["0"]["weight"].flatten(1).norm(dim=1)
    scheme.restore()
    if scale == "unit" or zero == "all filters":
        wanted = torch.ones(int(mask.sum()))
    elif scale == "old":
        wanted = old
    else:
        wanted = (old if zero == "all kept filters" else norms[kept[1:]]).mean().expand(int(mask.sum()))
    torch.testing.assert_close(net[0].weight.detach()[mask].flatten(1).norm(dim=1), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_the_norm_of_half_precision_filters_is_right_after_rounding(dtype, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)).to(dtype)
    net[0].weight.data.mul_(size)
    _, _, scheme = plain_scheme(net, drop_ratio=0.5)
    scheme.drop()
    mask = scheme.masks["0"]
    transition = scheme.restore()
    rows = net[0].weight.detach().double().flatten(1)
    norms = rows.norm(dim=1)
    if (norms[~mask] > 0).all() and size == 1:
        # An entry of bfloat16 has 8 bits; the mean of a filter's rounding errors is much smaller.
        torch.testing.assert_close(norms[mask], norms[~mask].mean().expand(16), rtol=1e-3, atol=0)
    assert (norms[mask] > 0).all()
    unit = rows / norms.clamp_min(1e-300)[:, None]
    assert (unit[mask] @ unit[~mask].T).abs().max() <= transition.max_cosine["0"] + 1e-6


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_a_returning_filter_takes_steps_like_a_kept_one(kind):
    """How far the first layer's filters go in 40 steps after a restore, their largest entries summed."""
    net = plain_net()
    _, opt, scheme = plain_scheme(net, getattr(torch.optim, kind)(net.parameters(), 1e-3))
    train_on_noise(net, opt, 150)
    scheme.drop()
    train_on_noise(net, opt, 100)
    mask, layer = scheme.masks["0"].clone(), scheme.layers[0]
    scheme.restore()
    travelled = {True: 0.0, False: 0.0}
    for _ in range(40):
        before = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
        train_on_noise(net, opt, 1)
        for returned in travelled:
            travelled[returned] += max(
                (tensor - before[name]).abs()[mask == returned].max().item() for name, tensor in layer.tensors().items()
            )
    assert 0 < travelled[True] <= 1.3 * travelled[False], travelled


def train_on_noise(net, opt, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net, torch.randn(8, 3, 8, 8, generator=generator)).backward()
        opt.step()


def test_squares_of_kernels_on_returning_channels():
    """While a channel is zero, the squared gradients of the kernels that read it decay."""
    net = readable_net()
    opt = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.9, 0.9))
    scheme = RePrScheme(find_filter_layers(net, ["*"]), opt, model=net)
    train(net, opt, steps=10)
    scheme.check()
    scheme.drop()
    train(net, opt, steps=40)
    returned, own = scheme.masks["0"].clone(), scheme.masks["3"].clone()
    squares = opt.state[net[3].weight]["exp_avg_sq"]
    before = squares.clone()
    assert before[~own][:, returned].mean() < 0.05 * before[~own][:, ~returned].mean()
    scheme.restore()
    with_own = before.clone()
    with_own[own] = before[~own].mean()  # as those begin again
    least = with_own[:, ~returned].mean()
    wanted = before[~own][:, returned].clamp_min(least)
    torch.testing.assert_close(squares[~own][:, returned], wanted, rtol=1e-5, atol=0)
    assert torch.equal(squares[~own][:, ~returned], before[~own][:, ~returned])


# --- what changes while filters are out -----------------------------------------------------------------------------


def test_norms_that_begin_to_train_while_filters_are_out():
    """Gradual unfreezing: gamma and beta of dropped filters stay zero."""
    net = plain_net()
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for norm in (net[1], net[4]):
        norm.requires_grad_(False)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), opt)
    train(net, opt)
    scheme.drop()
    for norm in (net[1], net[4]):
        norm.requires_grad_(True)
    train(net, opt)
    assert largest_dropped(scheme) == 0
    assert net[1].weight.grad[~scheme.masks["0"]].abs().min() > 0
    scheme.restore()


def test_a_layer_that_is_frozen_while_filters_are_out_gets_its_old_ones():
    net, opt, scheme = plain_scheme()
    train(net, opt)
    old = copy.deepcopy(net.state_dict())
    scheme.drop()
    masks = {name: mask.clone() for name, mask in scheme.masks.items()}
    net[0].weight.requires_grad_(False)
    scheme.restore()
    for key in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(net.state_dict()[key][masks["0"]], old[key][masks["0"]]), key
    assert not torch.isclose(net[3].weight[masks["3"]], old["3.weight"][masks["3"]]).any()


@pytest.mark.parametrize("old", [True, False])
def test_filters_that_return_as_they_were(old):
    """What ``finish("old")`` does: the network of before the drop, where nothing has been trained in between."""
    net, opt, scheme = plain_scheme()
    train(net, opt)
    before = copy.deepcopy(net.state_dict())
    scheme.drop()
    transition = scheme.restore(as_they_were=old)
    same = [torch.equal(value, before[name]) for name, value in net.state_dict().items()]
    assert all(same) if old else not all(same)
    assert bool(transition.max_cosine) != old and scheme.cycle == 1


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_gradients_made_by_hand_are_seen_however_late_they_come(steps):
    """A GradScaler that skips the first steps, and gradients that nobody computed: looked at in steps 1, 2, 4, 8."""
    net, opt, scheme = plain_scheme()
    train(net, opt)
    scheme.drop()
    seen = None
    for step in range(1, 9):
        opt.zero_grad()
        loss_of(net).backward()
        if step > steps:
            for parameter in net.parameters():
                parameter.grad += 1e-3
        opt.step()
        try:
            scheme.check()
        except UserError as error:
            seen = step
            assert "dropped filters of 0 are not zero any more" in str(error)
            break
    assert seen == 2 ** steps.bit_length()


def test_channels_that_are_not_0_in_the_first_pass_of_the_sub_network_are_named():
    """Something that adds to a channel, which the traced pass of before the drop did not show."""
    net = readable_net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    scheme = RePrScheme(find_filter_layers(net, ["*"]), opt, model=net)
    train(net, opt)
    scheme.check()
    scheme.drop()
    net[4].forward = lambda x: nn.BatchNorm2d.forward(net[4], x) + 0.1
    train(net, opt, steps=1)
    with pytest.raises(UserError, match="dropped channels of 3 are not 0 in the sub-network's first pass"):
        scheme.check()


def test_an_optimizer_that_keeps_the_weights_elsewhere_is_seen_after_the_restore():
    """Master weights that no state shows put the returned filters back to zero."""
    net, opt, scheme = plain_scheme()
    train(net, opt)
    scheme.drop()
    train(net, opt)
    scheme.check()
    masters = {name: value.clone() for name, value in net.state_dict().items()}
    scheme.restore()
    net.load_state_dict(masters)
    with pytest.raises(UserError, match=r"filters of 0 are gone one step after they returned in cycle 1"):
        scheme.check()
    scheme.check()  # once


# --- who holds a model ----------------------------------------------------------------------------------------------


def test_one_scheme_a_model():
    net = readable_net()
    opt = torch.optim.SGD(net.parameters(), 0.1)

    def build(net=net):
        return RePrScheme(find_filter_layers(net, ["*"]), opt, model=net)

    first = build()
    with pytest.raises(UserError, match=r"0 belongs to another RePr already: close\(\) that one first$"):
        build()
    twin = copy.deepcopy(net)  # copies are free, and without hooks
    twin(IMAGES)
    assert not first.participants.news
    first.close()
    second = build()
    del first
    train(net, opt)
    second.check()
    second.drop()
    with pytest.raises(UserError, match="RePr cannot be copied"):
        copy.deepcopy(second)
    kept = weakref.ref(second)
    del second
    with pytest.raises(UserError, match=r"after finish\(\) brings its filters back"):
        build()
    kept().restore()
    gc.collect()
    assert kept() is None  # one that is forgotten in the full phase is out of the way
    build()


@pytest.mark.parametrize("name", ["readers", "slim_model", "slim", "apart"])
def test_arguments_of_0_2_0_have_no_effect(name):
    with pytest.warns(DeprecationWarning, match=f"RePr: {name}= has no effect since version 0.3.0"):
        plain_scheme(**{name: None})
