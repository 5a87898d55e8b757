"""Dropped filters stay at zero whatever the training loop does, and where something moves them the restore says so."""

import copy
import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_weights, refused
from plain_nets import IMAGES, in_sub_network, largest_dropped, loss_of, plain_net, plain_scheme, readable_net, train
from torch import nn
from traced_nets import Net

from repr_det import RePrScheme, UserError, find_filter_layers
from repr_det.method.passes import TrainingPasses
from repr_det.method.returning import new_filters


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
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
        if micro_batch == 8:  # gradients wait, and a state is loaded
            saved, scheme = scheme.state_dict(), plain_scheme(net, opt)[2]
            for parameter in net.parameters():
                parameter.grad += 1
            scheme.load_state_dict(saved)
        assert not scheme.is_sub or largest_dropped(scheme) == 0
    scheme.restore()


def test_what_moved_dropped_filters_is_named_at_the_restore():
    net, _, scheme, masks = in_sub_network()
    net[4].bias.data[masks["3"]] += 1e-30
    before = copy.deepcopy(net.state_dict())
    assert "dropped filters of 3 are not zero any more at the restore of cycle 1" in refused(scheme.restore)
    assert scheme.is_sub
    assert_same_weights(net.state_dict(), before)


@pytest.mark.parametrize(
    ("transition", "tensor", "value"), [("drop", "weight", "nan"), ("restore", "norm.bias", "inf")]
)
def test_weights_that_are_not_finite_are_named(transition, tensor, value):
    scheme = in_sub_network()[2] if transition == "restore" else plain_scheme()[2]
    layer = scheme.layers[1]
    layer.tensors()[tensor].data[layer.weight.flatten(1).any(1).nonzero()[0]] = float(value)
    assert f"the {tensor} of 3 is not finite at the {transition} of cycle 1" in refused(getattr(scheme, transition))
    assert scheme.is_sub == (transition == "restore") and scheme.cycle == 0


def test_several_optimizers():
    """Conv weights and norms stepped by two optimizers of the same kind end as if stepped by one."""
    ends = []
    for apart in (True, False):
        net = plain_net()
        convs, norms = [net[0].weight, net[3].weight], [*net[1].parameters(), *net[4].parameters()]
        groups = [convs, norms] if apart else [[*convs, *norms]]
        optimizers = [torch.optim.SGD(group, 0.1, momentum=0.9, weight_decay=1e-2) for group in groups]
        scheme = RePrScheme(find_filter_layers(net, ["*"]), optimizers if apart else optimizers[0])
        for transition in (scheme.drop, scheme.restore, lambda: None):
            train(net, *optimizers)
            transition()
            assert not scheme.is_sub or largest_dropped(scheme) == 0
        ends.append(net.state_dict())
    assert_same_weights(*ends)


@pytest.mark.parametrize(("member", "modules"), [("norm.weight", [0, 3]), ("weight", [1, 4])])
def test_members_that_no_optimizer_holds_are_refused_by_name(member, modules):
    net = plain_net(bias=True)
    optimizer = torch.optim.SGD([p for i in modules for p in net[i].parameters()], 0.1)
    assert f"does not hold the {member} of 0: give all optimizers (a list)" in refused(plain_scheme, net, optimizer)
    if member != "weight":  # what does not train may be held by none
        net[1].requires_grad_(False), net[4].requires_grad_(False)
        plain_scheme(net, optimizer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("slow", torch.zeros(16, 3, 3, 3), "filters of 0"),
        ("exp_avg", torch.zeros(16, 3, 3, 3, dtype=torch.uint8), "filters of 0"),
        ("exp_avg", torch.zeros(16), "filters of 0"),
        ("d", torch.zeros(10000), "all weights together"),
    ],
)
def test_optimizers_that_are_not_understood_are_refused_before_the_drop(key, value, message):
    net, opt, scheme = plain_scheme()
    opt.state[net[0].weight][key] = value
    before = copy.deepcopy(net.state_dict())
    assert f"the optimizer SGD keeps '{key}' for {message}" in refused(scheme.drop)
    assert not scheme.is_sub
    assert_same_weights(net.state_dict(), before)
    without_eps = torch.optim.Adam(net.parameters(), 0.1, eps=0.0)
    assert "the optimizer Adam has eps 0" in refused(plain_scheme, net, without_eps)


@pytest.mark.parametrize(
    ("rates", "frozen", "dropped", "message"),
    [
        ((0.0, 0.1), [], {"3": 4}, "no filter is dropped of 0 (its learning rate is 0)"),
        ((0.0, 0.0), [], {"0": 8, "3": 1}, ""),  # a warm-up from 0 is not a frozen network
        ((0.1, 0.1), [0], {"3": 4}, "no filter is dropped of 0 (it does not require a gradient)"),
        ((0.1, 0.1), [0, 3], {}, "no layer learns, such as 0 (it does not require a gradient)"),
    ],
)
def test_layers_that_do_not_learn_lose_no_filter(rates, frozen, dropped, message, caplog):
    net = plain_net()
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip((net[:3], net[3:]), rates, strict=True)]
    passes = TrainingPasses(net, lambda *_: [IMAGES], lambda batch: loss_of(net, batch))
    looks = {} if dropped else {"criterion": "redundant", "passes": passes}  # a score needs a layer that learns
    net, opt, scheme = plain_scheme(net, torch.optim.SGD(groups), **looks)
    train(net, opt)
    for number in frozen:
        net[number].weight.requires_grad_(False)
        net[number].weight.grad = None
    train(net, opt, steps=1)
    if dropped:
        assert {name: len(rows) for name, rows in scheme.drop().dropped.items()} == dropped
        assert message in caplog.text and bool(caplog.records) == bool(message)
    else:
        assert message in refused(scheme.drop)


def test_layers_without_a_gradient_lose_no_filter_also_when_resumed(caplog):
    """A second conv that never runs, one of which the loss knows nothing, and one whose loss weighs nothing."""

    def forward(net, x):
        net.unused(x)
        return net.main(x) + 0 * net.weightless(x)

    others = {name: nn.Conv2d(3, 16, 3, padding=1) for name in ("idle", "unused", "weightless")}
    net = Net(forward, main=plain_net(), **others)
    _, opt, scheme = plain_scheme(net)
    for steps in (4, 1):
        train(net, opt, steps=steps)
        assert not set(scheme.drop().dropped) & {"idle", "unused"}
        assert "no filter is dropped of idle (it has had no gradient), unused (it has had no gradient)" in caplog.text
        scheme.restore()
        saved = scheme.state_dict()
        scheme = plain_scheme(net, opt)[2]
        scheme.load_state_dict(saved)


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


@pytest.mark.parametrize(
    ("scale", "zeros", "norms"),
    [
        ("kept", 1, [2.0, 2.0]),  # of the kept filters that have a norm
        ("kept", 12, [2.5, 2.5]),  # else of the old ones
        ("kept", 14, [1.0, 1.0]),
        ("old", 12, [1.0, 4.0]),
        ("old", 13, [4.0, 4.0]),
    ],
)
def test_a_new_filter_never_has_norm_0(scale, zeros, norms):
    """The first ``zeros`` of 12 kept filters, of norm 2, and 2 old ones, of norms 1 and 4, are zero."""
    sizes = torch.tensor([*[2.0] * 12, 1.0, 4.0])
    sizes[:zeros] = 0
    weight = F.normalize(torch.randn(14, 27, generator=torch.Generator().manual_seed(0))) * sizes[:, None]
    old, out = weight[12:].clone(), torch.arange(14) >= 12
    weight[out] = 0
    new, _ = new_filters(weight, old, out, 1, scale, torch.Generator())
    torch.testing.assert_close(new.norm(dim=1), torch.tensor(norms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_the_norm_of_half_precision_filters_is_right_after_rounding(dtype, size):
    weight = (0.1 * size * torch.randn(32, 144, generator=torch.Generator().manual_seed(0))).to(dtype)
    out = torch.arange(32) < 16
    new, cosine = new_filters(weight, weight[out], out, 1, "kept", torch.Generator())
    assert new.dtype == dtype and (new.double().norm(dim=1) > 0).all()
    new, kept = new.double(), weight[~out].double()
    if size == 1:
        # An entry of bfloat16 has 8 bits; the mean of a filter's rounding errors is much smaller.
        torch.testing.assert_close(new.norm(dim=1), kept.norm(dim=1).mean().expand(16), rtol=1e-3, atol=0)
    assert (F.normalize(new) @ F.normalize(kept, eps=1e-300).T).abs().max() <= cosine + 1e-6


def test_squares_of_kernels_on_returning_channels():
    """While a channel is zero, the squared gradients of the kernels that read it decay."""
    net = readable_net()
    opt = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.9, 0.9))
    _, _, scheme, masks = in_sub_network(net, opt, 3, 40, model=net)
    returned, own = masks["0"], masks["3"]
    squares = opt.state[net[3].weight]["exp_avg_sq"]
    before = squares.clone()
    scheme.restore()
    with_own = before.clone()
    with_own[own] = before[~own].mean()  # as those begin again
    wanted = before[~own][:, returned].clamp_min(with_own[:, ~returned].mean())
    torch.testing.assert_close(squares[~own][:, returned], wanted, rtol=1e-5, atol=0)
    assert torch.equal(squares[~own][:, ~returned], before[~own][:, ~returned])


def test_norms_that_begin_to_train_while_filters_are_out():
    net = plain_net()
    net[1].requires_grad_(False), net[4].requires_grad_(False)
    _, opt, scheme, masks = in_sub_network(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    net.requires_grad_(True)
    train(net, opt)
    assert largest_dropped(scheme) == 0 and net[1].weight.grad[~masks["0"]].abs().min() > 0


def test_a_layer_that_is_frozen_while_filters_are_out_gets_its_old_ones():
    net = plain_net()
    old = copy.deepcopy(net.state_dict())
    _, _, scheme, masks = in_sub_network(net, before=0)
    net[0].weight.requires_grad_(False)
    scheme.restore()
    for key in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(net.state_dict()[key][masks["0"]], old[key][masks["0"]]), key
    assert not torch.isclose(net[3].weight[masks["3"]], old["3.weight"][masks["3"]]).any()


def test_what_moves_dropped_filters_is_seen_after_1_2_4_and_8_steps():
    net, opt, scheme, masks = in_sub_network()
    for step in range(1, 11):
        train(net, opt, steps=1)
        net[0].weight.data[masks["0"]] = 1e-3
        message = rf"dropped filters of 0 are not zero any more {step} steps after the drop of cycle 1 \(their weight\)"
        with pytest.raises(UserError, match=message) if step in (1, 2, 4, 8) else nullcontext():
            scheme.check()
        net[0].weight.data[masks["0"]] = 0


def test_channels_that_are_not_0_in_the_first_pass_of_the_sub_network_are_named():
    net = readable_net()
    net, opt, scheme, _ = in_sub_network(net, model=net)
    net[4].forward = lambda x: nn.BatchNorm2d.forward(net[4], x) + 0.1
    train(net, opt, steps=1)
    assert "dropped channels of 3 are not 0 in the sub-network's first pass" in refused(scheme.check)


def test_a_norm_that_first_runs_while_filters_are_out_is_seen(caplog):
    """One norm a domain. The other's second run is traced; from the next cycle on the conv keeps its filters."""
    domain = [0]
    net = Net(lambda net, x: net.last(net.norms[domain[0]](net.first(net.body(x))).relu()), body=plain_net()[:3])
    net.first, net.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
    net.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
    opt = torch.optim.SGD(net.parameters(), 0.1)
    scheme = RePrScheme(find_filter_layers(net, ["body.0", "first"]), opt, model=net)
    warned = "filters are out of first (several norms follow it): exclude these convs"
    for step in range(8):
        domain[0] = step in (4, 6)
        train(net, opt, steps=1)
        scheme.check()
        assert caplog.text.count(warned) == (step >= 6)
        if step == 1:
            assert set(scheme.drop().dropped) == {"body.0", "first"}
    scheme.restore()
    assert set(scheme.drop().dropped) == {"body.0"}


def test_an_optimizer_that_keeps_the_weights_elsewhere_is_seen_after_the_restore():
    """Master weights that no state shows put the returned filters back to zero."""
    net, _, scheme, _ = in_sub_network(during=3)
    scheme.check()
    masters = {name: value.clone() for name, value in net.state_dict().items()}
    scheme.restore()
    net.load_state_dict(masters)
    assert "filters of 0 are gone one step after they returned in cycle 1" in refused(scheme.check)
    scheme.check()  # once


def test_one_scheme_a_model():
    net = readable_net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    build = partial(RePrScheme, find_filter_layers(net, ["*"]), opt, model=net)
    first = build()
    assert refused(build) == "0 belongs to another RePr already: close() that one first"
    assert "RePr cannot be copied" in refused(copy.deepcopy, first)
    copied = copy.deepcopy(net)  # free, and without hooks
    in_sub_network(copied, model=copied)
    assert not first.participants.watch.has_news
    first.close()
    second = build()
    del second  # one that is forgotten in the full phase is out of the way, not so one that holds filters
    gc.collect()
    in_sub_network(net, opt, model=net)
    gc.collect()
    assert "another RePr holds filters of 0 at zero: finish() and close() it" in refused(build)
