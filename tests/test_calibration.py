"""FrozenBN moments after a restore."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import assert_same_weights
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from frozen_nets import (
    LAYERS,
    WIDTH,
    InsideNet,
    assert_same_moments,
    batches,
    buffers,
    fuse,
    make,
    masks_of,
    output_statistics,
    passes_of,
    train,
)
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers

TorchvisionNet = partial(InsideNet, torchvision.ops.FrozenBatchNorm2d)  # another class with the same buffers


@pytest.mark.parametrize(("model", "fused"), [(InsideNet, True), (InsideNet, False), (TorchvisionNet, True)])
@pytest.mark.parametrize("scale", ["kept", "unit"])
def test_restored_channels_have_their_moments_of_before_the_drop(model, fused, scale, tmp_path):
    """In both cycles, each of which has batches of its own; in the second after a resume."""
    net, optimizer, scheme, _ = make(model, fused, log=(log := []), scale=scale)
    for cycle in (0, 1):
        images = torch.cat(batches(4, cycle))
        before, old = output_statistics(net, images), buffers(net)
        scheme.drop()
        masks = masks_of(scheme)
        assert all(mask.sum() >= 3 for mask in masks.values())
        train(net, optimizer, 5)
        kept_weights = {n: getattr(net, n).weight.detach()[~masks[n]].clone() for n in LAYERS}
        if cycle:
            torch.save({"model": net.state_dict(), "scheme": scheme.state_dict()}, tmp_path / "state.pth")
            saved = torch.load(tmp_path / "state.pth", weights_only=True)
            net, _, scheme, _ = make(model, not fused, log=log, scale=scale)
            net.load_state_dict(saved["model"])
            scheme.load_state_dict(saved["scheme"])
        scheme.restore()
        assert log[2 * cycle :] == [(4, cycle), (4, cycle)]  # the same ones at the drop and the restore
        assert_same_moments(output_statistics(net, images), before, masks)
        new = buffers(net)
        for name, mask in masks.items():
            assert all(torch.equal(new[name][key], old[name][key]) for key in ("weight", "bias"))
            for key in ("running_mean", "running_var"):
                assert torch.equal(new[name][key][~mask], old[name][key][~mask]), (name, key)
                assert (new[name][key][mask] != old[name][key][mask]).all(), (name, key)
            assert (new[name]["running_var"] >= 0).all()
            assert torch.equal(getattr(net, name).weight.detach()[~mask], kept_weights[name])


def test_keeping_the_statistics_gives_other_moments_and_needs_no_batches():
    net, _, scheme, images = make(frozen_norm="keep", log=(log := []))
    before, old = output_statistics(net, images), copy.deepcopy(dict(net.named_buffers()))
    scheme.drop()
    masks = masks_of(scheme)
    scheme.restore()
    assert log == []
    assert_same_weights(dict(net.named_buffers()), old)
    with pytest.raises(AssertionError):  # so the check sees the difference
        assert_same_moments(output_statistics(net, images), before, masks)


CHOSEN = [1, 4, 7, 9, 11, 12]
TINY = torch.tensor([1e-6, 1e-9, 1e-13, 1e-20, 1e-30, -1e-40])


def chosen(filters: dict[str, list[int]]):
    """A criterion that drops these."""

    def score(layer):
        scores = torch.zeros(layer.num_filters)
        scores[filters.get(layer.name, [])] = 1
        return scores

    return score


CONSTANT, DEAD = {"norm.weight": 0, "norm.bias": 1}, {"norm.weight": 0, "norm.bias": 0}
NO_SCALE = {  # of conv3 before the drop, of all of conv2 before it, and of conv2 while the filters are away
    "gamma 0, beta 1": ({"norm.weight": 0, "norm.bias": 1}, {}, {}),
    "tiny gamma": ({"norm.weight": TINY}, {}, {}),
    "dead at the drop": ({"weight": 0}, {}, {}),
    "dead at the drop, variance 0": ({"weight": 0, "norm.running_var": 0}, {}, {}),
    "constant at both, tiny gamma": ({"norm.weight": TINY}, CONSTANT, CONSTANT),
    "dead at both": ({}, DEAD, DEAD),
    "constant at the restore": ({}, {}, CONSTANT),
    "dead at the drop, constant at the restore": ({"weight": 0}, {}, CONSTANT),
}


@pytest.mark.parametrize("case", NO_SCALE)
def test_channels_without_a_scale_stay_finite(case):
    net, optimizer, scheme, images = make(criterion=chosen({"conv3": CHOSEN}), drop_ratio=0.1)  # 6 of 64
    changes, front, front_later = NO_SCALE[case]

    def change(conv, values, rows):
        tensors = dict(conv.named_parameters()) | dict(conv.named_buffers())
        for name, value in values.items():
            tensors[name].detach()[rows] = value

    change(net.conv3, changes, CHOSEN)
    change(net.conv2, front, slice(None))
    before, old = output_statistics(net, images), buffers(net)
    scheme.drop()
    assert scheme.masks["conv3"].nonzero().flatten().tolist() == CHOSEN
    change(net.conv2, front_later, slice(None))
    scheme.restore()
    (mean, std), (mean_before, std_before) = output_statistics(net, images)["conv3"], before["conv3"]
    assert np.isfinite(mean).all() and np.isfinite(std).all()
    kept = [i for i in range(2 * WIDTH) if i not in CHOSEN]
    for key, value in buffers(net)["conv3"].items():
        assert torch.isfinite(value).all() and torch.equal(value[kept], old["conv3"][key][kept]), key
    if "gamma 0" in case:  # such a channel is its beta, before and after
        np.testing.assert_allclose([mean[CHOSEN], std[CHOSEN]], [mean_before[CHOSEN], std_before[CHOSEN]], atol=1e-6)
    # No channel gets out of hand either: it is at most as far from its bias as a normalised one.
    weight, bias = (old["conv3"][key].abs().max().item() for key in ("weight", "bias"))
    assert std[CHOSEN].max() <= max(std_before.max(), weight) * 1.01
    assert np.abs(mean[CHOSEN]).max() <= max(np.abs(mean_before).max(), bias) + 1e-3
    train(net, optimizer, 2)
    assert torch.isfinite(net(images)).all()


def test_a_scale_out_of_reach_of_eps_still_gets_its_mean():
    """sqrt(v + eps) >= sqrt(eps): a filter that is far too small cannot have the old deviation, but the old mean."""
    net, _, scheme, images = make()
    before = output_statistics(net, images)
    scheme.drop()
    masks = masks_of(scheme)
    with torch.no_grad():
        for name in LAYERS:
            getattr(net, name).weight.mul_(1e-5)  # "kept" makes the new filters as small
    scheme.restore()
    for name, (mean, std) in output_statistics(net, images).items():
        mask = masks[name]
        np.testing.assert_allclose(mean[mask], before[name][0][mask], rtol=1e-3, atol=1e-4)
        assert (std[mask] <= before[name][1][mask] * 1.001).all()


class BlockNet(BottleneckBlock):
    def __init__(self) -> None:
        super().__init__(3, 2 * WIDTH, bottleneck_channels=WIDTH, norm="FrozenBN")
        self.last = nn.Conv2d(2 * WIDTH, 4, 1)

    def forward(self, x):
        return self.last(super().forward(x))

    def norm_of(self, name: str) -> nn.Module:
        return getattr(self, name).norm


@pytest.mark.parametrize("all_closed", [False, True])
def test_a_channel_whose_relu_never_opens_returns_as_one_that_opens(all_closed):
    """With the moments it had it would be closed again; what is added to a shortcut may well be below 0 everywhere."""
    closed = {"conv1": [2, 5], "conv2": list(range(WIDTH)) if all_closed else [0, 7, 8], "conv3": [3]}
    leaving = {"conv1": [2, 5, 6], "conv2": [0, 7, 9], "conv3": [3, 4]}
    net, images = BlockNet(), torch.cat(batches(4, 0))
    fuse(net, images, seed=1)
    for name, filters in closed.items():
        net.norm_of(name).bias[filters] -= 50
    options = {"criterion": chosen(leaving), "drop_ratio": 8.5 / (4 * WIDTH), "model": net, "passes": passes_of(net)}
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), torch.optim.SGD(net.parameters(), 0.02), **options)
    scheme.passes.loss(images)
    scheme.check()
    wanted = output_statistics(net, images)
    for name, filters in leaving.items():
        if name == "conv3" or (all_closed and name == "conv2"):
            continue
        opens = [i for i in range(WIDTH) if i not in closed[name]]
        for moment in wanted[name]:
            moment[[one for one in filters if one in closed[name]]] = np.sort(moment[opens])[(len(opens) - 1) // 2]
    scheme.drop(), scheme.restore()
    assert_same_moments(output_statistics(net, images), wanted, leaving)


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
        for norm in map(self.norm_of, LAYERS):
            norm.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for norm in map(self.norm_of, LAYERS):
            norm.eval()
        return self


@pytest.mark.parametrize(
    ("scale", "learnable", "evaluating"),
    [(1.0, False, False), (50.0, True, False), (50.0, False, True), (1.0, True, True)],
)
def test_bn_in_eval_mode_is_recalibrated_too(scale, learnable, evaluating):
    net, optimizer, scheme, images = make(EvaluatedNorms, frozen_norm="recalibrate")
    with torch.no_grad():
        net.conv1.weight *= scale
    fuse(net, images, seed=1)
    for name in LAYERS:
        net.norm_of(name).requires_grad_(learnable)
    train(net, optimizer, 2)
    net.train(not evaluating)  # whoever evaluates before the drop
    before, frozen = output_statistics(net, images), buffers(net)
    scheme.drop()
    masks = masks_of(scheme)
    train(net, optimizer, 2)
    scheme.restore()
    net.train()
    assert_same_moments(output_statistics(net, images), before, masks)
    for name in LAYERS:
        for key, value in buffers(net)[name].items():
            rows = ~masks[name] if key.startswith("running") else slice(None)
            assert (learnable and "running" not in key) or torch.equal(value[rows], frozen[name][key][rows]), key


def scheme_of(net, *, seen=True, **options):
    """A scheme, and one training step of its model that shows what it is."""
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, drop_ratio=0.4, **options)
    if seen:
        train(net, optimizer, 1)
        scheme.check()
    return optimizer, scheme


def test_frozen_bn_without_batches_is_refused_or_kept():
    told = r"BN in eval mode re-calibration looks at training batches \(the norm of conv1 keeps its statistics"
    net = EvaluatedNorms()
    with pytest.raises(UserError, match=told):
        scheme_of(net)
    _, scheme = scheme_of(net, seen=False, frozen_norm="keep")
    before = copy.deepcopy(dict(net.named_buffers()))
    scheme.drop(), scheme.restore()
    assert_same_weights(dict(net.named_buffers()), before)
    later = InsideNet(nn.BatchNorm2d)
    _, scheme = scheme_of(later, seen=False)
    later.conv2.norm.eval()
    with pytest.raises(UserError, match="the norm of conv2 keeps its statistics"):
        scheme.drop()
    whole = InsideNet(nn.BatchNorm2d).eval()  # that trains in eval mode, as usual in fine-tuning
    with pytest.raises(UserError, match=told):
        scheme_of(whole, model=whole)


def test_a_model_that_trains_in_eval_mode_keeps_its_statistics():
    net, images = InsideNet(nn.BatchNorm2d).eval(), torch.cat(batches(4, 0))
    _, scheme = scheme_of(net, model=net, passes=passes_of(net))
    before = output_statistics(net, images)
    scheme.drop()
    masks = masks_of(scheme)
    scheme.restore()
    assert_same_moments(output_statistics(net, images), before, masks)
    assert not net.training


@pytest.mark.parametrize("with_batches", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_norms_that_are_in_eval_mode_at_the_restore(with_batches, frozen, caplog):
    """If the whole model is, someone evaluates, and nothing is frozen. If norms were frozen since the drop, new filters
    come out with mean 0 and deviation 1, as BN would make them; without batches old ones return as they were."""
    torch.manual_seed(0)
    net = InsideNet(nn.BatchNorm2d)
    optimizer, scheme = scheme_of(net, model=net, passes=passes_of(net) if with_batches else None, criterion="random")
    old = copy.deepcopy(net.state_dict())
    net.train(frozen)
    scheme.drop()
    masks = masks_of(scheme)
    net.train()
    train(net, optimizer, 2)
    for module in map(net.norm_of, LAYERS) if frozen else [net]:
        module.eval()
    scheme.restore()
    after = output_statistics(net, torch.cat(batches(4, 0)))
    for name, rows in masks.items():
        if not frozen:
            norm = net.norm_of(name)
            assert (norm.running_mean[rows] == 0).all() and (norm.running_var[rows] == 1).all()
        elif with_batches:
            np.testing.assert_allclose(after[name][0][rows], 0, atol=1e-4)
            np.testing.assert_allclose(after[name][1][rows], 1, atol=1e-3)
        else:
            values = net.state_dict()
            keys = [f"{name}.{key}" for key in ("weight", "norm.weight", "norm.running_mean", "norm.running_var")]
            assert all(torch.equal(values[key][rows], old[key][rows]) for key in keys)
            assert f"filters of {name} return as they were: its norm has been frozen since the drop" in caplog.text
    assert bool(caplog.text) == (frozen and not with_batches)
