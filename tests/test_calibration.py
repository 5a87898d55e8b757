"""FrozenBN moments after a restore."""

import copy
from functools import partial

import pytest
import torch
import torchvision
from conftest import assert_same_weights, refused
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from frozen_nets import LAYERS, WIDTH, InsideNet, batches, fuse, make, moments_of, passes_of, train
from torch import nn

from repr_det import RePrScheme

TorchvisionNet = partial(InsideNet, torchvision.ops.FrozenBatchNorm2d)  # another class with the same buffers
BatchNet = partial(InsideNet, nn.BatchNorm2d)
TENSORS = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def assert_same_moments(after, before, rows):
    for name in LAYERS:
        torch.testing.assert_close(after[name][:, rows[name]], before[name][:, rows[name]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "fused"), [(InsideNet, True), (InsideNet, False), (TorchvisionNet, True)])
@pytest.mark.parametrize("scale", ["kept", "unit"])
def test_restored_channels_have_their_moments_of_before_the_drop(model, fused, scale, tmp_path):
    """In both cycles, each of which has batches of its own; in the second after a resume."""
    net, optimizer, scheme, _ = make(model, fused, log=(log := []), scale=scale)
    for cycle in (0, 1):
        images = torch.cat(batches(4, cycle))
        before, old = moments_of(net, images), copy.deepcopy(net.state_dict())
        scheme.drop()
        masks = dict(scheme.masks)
        assert all(mask.sum() >= 3 for mask in masks.values())
        train(net, optimizer, 5)
        trained = copy.deepcopy(net.state_dict())
        if cycle:
            torch.save({"model": trained, "scheme": scheme.state_dict()}, tmp_path / "state.pth")
            saved = torch.load(tmp_path / "state.pth", weights_only=True)
            net, _, scheme, _ = make(model, not fused, log=log, scale=scale)
            net.load_state_dict(saved["model"])
            scheme.load_state_dict(saved["scheme"])
        scheme.restore()
        assert log[2 * cycle :] == [(4, cycle), (4, cycle)]  # the same ones at the drop and the restore
        assert_same_moments(moments_of(net, images), before, masks)
        for name, mask in masks.items():
            for key in TENSORS:
                new, then, first = (state[f"{name}.{key}"] for state in (net.state_dict(), trained, old))
                assert torch.equal(new[~mask], then[~mask]), (name, key)
                assert (new[mask] == first[mask]).all() == (key in ("norm.weight", "norm.bias")), (name, key)
            assert (net.norms()[name].running_var >= 0).all()


def test_keeping_the_statistics_needs_no_batches():
    net, _, scheme, _ = make(frozen_norm="keep", log=(log := []))
    old = copy.deepcopy(dict(net.named_buffers()))
    scheme.drop(), scheme.restore()
    assert log == []
    assert_same_weights(dict(net.named_buffers()), old)


CHOSEN = [1, 4, 7, 9, 11, 12]
TINY = torch.tensor([1e-6, 1e-9, 1e-13, 1e-20, 1e-30, -1e-40])


def chosen(filters: dict[str, list[int]]):
    """A criterion that drops these."""
    return lambda layer: torch.tensor([float(i in filters.get(layer.name, ())) for i in range(layer.num_filters)])


CONSTANT = {"norm.weight": 0, "norm.bias": 1}
NO_SCALE = {  # of conv3 before the drop, and of all of conv2 while the filters are away
    "gamma 0, beta 1": (CONSTANT, {}),
    "tiny gamma": ({"norm.weight": TINY}, {}),
    "dead at the drop": ({"weight": 0}, {}),
    "dead at the drop, variance 0": ({"weight": 0, "norm.running_var": 0}, {}),
    "constant at the restore": ({}, CONSTANT),
    "dead at the drop, constant at the restore": ({"weight": 0}, CONSTANT),
}


@pytest.mark.parametrize("case", NO_SCALE)
def test_channels_without_a_scale_stay_finite(case):
    net, optimizer, scheme, images = make(criterion=chosen({"conv3": CHOSEN}), drop_ratio=0.1)  # 6 of 64
    changes, later = NO_SCALE[case]

    def change(conv, values, rows):
        for name, value in values.items():
            conv.state_dict()[name][rows] = value

    change(net.conv3, changes, CHOSEN)
    before, old = moments_of(net, images)["conv3"], copy.deepcopy(net.conv3.state_dict())
    scheme.drop()
    assert scheme.masks["conv3"].nonzero().flatten().tolist() == CHOSEN
    change(net.conv2, later, slice(None))
    scheme.restore()
    after = moments_of(net, images)["conv3"]
    assert after.isfinite().all()
    kept = [i for i in range(2 * WIDTH) if i not in CHOSEN]
    for key, value in net.conv3.state_dict().items():
        assert value.isfinite().all() and torch.equal(value[kept], old[key][kept]), key
    if "gamma 0" in case:  # such a channel is its beta, before and after
        torch.testing.assert_close(after[:, CHOSEN], before[:, CHOSEN], rtol=0, atol=1e-6)
    # No channel gets out of hand either: it is at most as far from its bias as a normalised one.
    weight, bias = (old[key].abs().max() for key in ("norm.weight", "norm.bias"))
    mean, std = after[:, CHOSEN].abs().amax(1)
    assert std <= max(before[1].max(), weight) * 1.01 and mean <= max(before[0].abs().max(), bias) + 1e-3
    train(net, optimizer, 2)
    assert net(images).isfinite().all()


def test_a_scale_out_of_reach_of_eps_still_gets_its_mean():
    """sqrt(v + eps) >= sqrt(eps): a filter that is far too small cannot have the old deviation, but the old mean."""
    net, _, scheme, images = make()
    before = moments_of(net, images)
    scheme.drop()
    masks = dict(scheme.masks)
    for name in LAYERS:
        getattr(net, name).weight.data.mul_(1e-5)  # "kept" makes the new filters as small
    scheme.restore()
    for name, after in moments_of(net, images).items():
        (mean, std), (old_mean, old_std) = after[:, masks[name]], before[name][:, masks[name]]
        torch.testing.assert_close(mean, old_mean, rtol=1e-3, atol=1e-4)
        assert (std <= old_std * 1.001).all()


@pytest.mark.parametrize("all_closed", [False, True])
def test_a_channel_whose_relu_never_opens_returns_as_one_that_opens(all_closed):
    """With its old moments it would be closed again; what is added to a shortcut may well be below 0 everywhere."""
    closed = {"conv1": [2, 5], "conv2": list(range(WIDTH)) if all_closed else [0, 7, 8], "conv3": [3]}
    leaving = {"conv1": [2, 5, 6], "conv2": [0, 7, 9], "conv3": [3, 4]}
    net, _, scheme, images = make(traced=True, criterion=chosen(leaving), drop_ratio=8.5 / (4 * WIDTH))
    for name, norm in net.norms().items():
        norm.bias.zero_()[closed[name]] = -50
    wanted = moments_of(net, images)
    for name in ("conv1",) if all_closed else ("conv1", "conv2"):
        opens = [i for i in range(WIDTH) if i not in closed[name]]
        middle = wanted[name][:, opens].sort(1).values[:, (len(opens) - 1) // 2]
        for filter in set(leaving[name]) & set(closed[name]):
            wanted[name][:, filter] = middle
    scheme.drop(), scheme.restore()
    assert_same_moments(moments_of(net, images), wanted, leaving)


def test_what_follows_the_last_layer_is_not_computed():
    net, optimizer, scheme, _ = make()
    train(net, optimizer, 1)
    reached = []
    for name in (*LAYERS, "classifier"):
        getattr(net, name).register_forward_hook(lambda module, inputs, output, name=name: reached.append(name))
    for transition in (scheme.drop, scheme.restore):
        reached.clear()
        transition()
        assert set(reached) == {"conv1", "conv2"}  # conv3's own hooks come after those of the norm inside it


def test_layers_that_the_batches_do_not_reach_keep_their_statistics():
    def unused():
        net = InsideNet()
        net.conv4 = Conv2d(3, WIDTH, 1, bias=False, norm=FrozenBatchNorm2d(WIDTH))
        return net

    net, _, scheme, _ = make(unused)
    old = copy.deepcopy(net.conv4.norm.state_dict())
    scheme.drop()
    assert scheme.masks["conv4"].any()
    scheme.restore()
    assert_same_weights(net.conv4.norm.state_dict(), old)


class EvaluatedNorms(InsideNet):
    """BN frozen the usual way: a ``train`` that leaves the norms in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d)
        for norm in self.norms().values():
            norm.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for norm in self.norms().values():
            norm.eval()
        return self


@pytest.mark.parametrize(
    ("scale", "learnable", "evaluating"),
    [(1.0, False, False), (50.0, True, False), (50.0, False, True), (1.0, True, True)],
)
def test_bn_in_eval_mode_is_recalibrated_too(scale, learnable, evaluating):
    net, optimizer, scheme, images = make(EvaluatedNorms)
    net.conv1.weight.data *= scale
    fuse(net, images)
    for norm in net.norms().values():
        norm.requires_grad_(learnable)
    train(net, optimizer, 2)
    net.train(not evaluating)  # whoever evaluates before the drop
    before, old = moments_of(net, images), copy.deepcopy(net.state_dict())
    scheme.drop()
    masks = dict(scheme.masks)
    train(net, optimizer, 2)
    scheme.restore()
    net.train()
    assert_same_moments(moments_of(net, images), before, masks)
    for name in LAYERS:
        for key in TENSORS[3 if learnable else 1 :]:
            rows = ~masks[name] if "running" in key else slice(None)
            assert torch.equal(net.state_dict()[f"{name}.{key}"][rows], old[f"{name}.{key}"][rows]), key


def test_frozen_bn_without_batches_is_refused():
    told = "BN in eval mode re-calibration looks at training batches (the norm of conv1 keeps its statistics"
    assert told in refused(make, EvaluatedNorms, passes=None)
    net, _, scheme, _ = make(BatchNet, passes=None)
    net.conv2.norm.eval()
    assert "the norm of conv2 keeps its statistics" in refused(scheme.drop)
    # A model that trains in eval mode, as usual in fine-tuning.
    assert told in refused(make, lambda: BatchNet().eval(), traced=True, passes=None)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_model_that_trains_in_eval_mode_keeps_its_statistics(resumed):
    net, _, scheme, images = make(lambda: BatchNet().eval(), traced=True)
    for norm in net.norms().values():
        norm.bias.data += 3  # no channel is closed
    before = moments_of(net, images)
    scheme.drop()
    masks = dict(scheme.masks)
    if resumed:
        state, options = scheme.state_dict(), {"passes": passes_of(net, []), "chosen": scheme.options}
        scheme.close()
        scheme = RePrScheme(scheme.layers, scheme.optimizers, model=net, **options)
        scheme.load_state_dict(state)
    scheme.restore()
    assert_same_moments(moments_of(net, images), before, masks)
    assert not net.training


@pytest.mark.parametrize("with_batches", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_norms_that_are_in_eval_mode_at_the_restore(with_batches, frozen, caplog):
    """If the whole model is, someone evaluates, and nothing is frozen. If norms were frozen since the drop, new filters
    come out with mean 0 and deviation 1, as BN would make them; without batches old ones return as they were."""
    net, optimizer, scheme, images = make(BatchNet, traced=True, **({} if with_batches else {"passes": None}))
    old = copy.deepcopy(net.state_dict())
    net.train(frozen)
    scheme.drop()
    masks = dict(scheme.masks)
    net.train()
    train(net, optimizer, 2)
    for module in net.norms().values() if frozen else [net]:
        module.eval()
    scheme.restore()
    after, values = moments_of(net, images), net.state_dict()
    for name, rows in masks.items():
        if not frozen:
            norm = net.norms()[name]
            assert (norm.running_mean[rows] == 0).all() and (norm.running_var[rows] == 1).all()
        elif with_batches:
            wanted = torch.tensor([[0.0], [1.0]]).double().expand(2, int(rows.sum()))
            torch.testing.assert_close(after[name][:, rows], wanted, rtol=0, atol=1e-3)
        else:
            assert all(torch.equal(values[f"{name}.{key}"][rows], old[f"{name}.{key}"][rows]) for key in TENSORS)
            assert f"filters of {name} return as they were: its norm has been frozen since the drop" in caplog.text
    assert bool(caplog.text) == (frozen and not with_batches)
