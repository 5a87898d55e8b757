"""FrozenBN moments after a restore."""

import copy

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from frozen_nets import (
    LAYERS,
    WIDTH,
    InsideNet,
    SiblingNet,
    assert_same_moments,
    batches,
    buffers,
    fuse,
    make,
    output_statistics,
    passes_of,
    train,
)
from torch import nn

from repr_det import RePrScheme, UserError, find_filter_layers
from repr_det.method.criteria import CRITERIA, Criterion


@pytest.mark.parametrize("model", [InsideNet, SiblingNet])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("scale", ["kept", "unit"])
def test_restored_channels_have_their_moments_of_before_the_drop(model, fused, scale):
    net, optimizer, scheme, images = make(model, fused, scale=scale)
    before, old = output_statistics(net, images), buffers(net)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    assert all(mask.sum() >= 3 for mask in masks.values())
    train(net, optimizer, 5)
    kept_weights = {n: getattr(net, n).weight.detach()[~masks[n]].clone() for n in LAYERS}
    scheme.restore()
    after, new = output_statistics(net, images), buffers(net)
    for name in LAYERS:
        mask = masks[name]
        for moment in range(2):
            np.testing.assert_allclose(after[name][moment][mask], before[name][moment][mask], rtol=1e-4, atol=1e-5)
        for key in ("weight", "bias"):
            assert torch.equal(new[name][key], old[name][key]), (name, key)
        for key in ("running_mean", "running_var"):
            assert torch.equal(new[name][key][~mask], old[name][key][~mask]), (name, key)
            assert (new[name][key][mask] != old[name][key][mask]).all(), (name, key)
        assert (new[name]["running_var"] >= 0).all()
        assert torch.equal(getattr(net, name).weight.detach()[~mask], kept_weights[name])


def test_keeping_the_statistics_gives_other_moments_and_needs_no_batches():
    net, _, scheme, images = make(frozen_norm="keep", log=(log := []))
    before, old = output_statistics(net, images), buffers(net)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    scheme.restore()
    assert log == []
    new = buffers(net)
    for name in LAYERS:
        assert all(torch.equal(new[name][k], old[name][k]) for k in new[name])
        # The check above would see the difference.
        change = np.abs(output_statistics(net, images)[name][1] / before[name][1] - 1)[masks[name]]
        assert change.max() > 0.1


def test_the_same_batches_at_the_drop_and_the_restore_and_others_in_the_next_cycle():
    net, _, scheme, _ = make(log=(log := []), calibration_batches=3)
    scheme.drop(), scheme.restore()
    assert log == [(3, 0), (3, 0)]
    scheme.drop()
    before = len(log)
    images = torch.cat(batches(3, 1))
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    scheme.restore()
    assert log[2:] == [(3, 1), (3, 1)] and before == 3
    assert all(np.isfinite(output_statistics(net, images)[name][0][masks[name]]).all() for name in LAYERS)


def test_moments_of_the_second_cycle_are_matched_too():
    net, optimizer, scheme, _ = make()
    scheme.drop(), train(net, optimizer, 2), scheme.restore()
    train(net, optimizer, 2)
    images = torch.cat(batches(4, 1))
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    train(net, optimizer, 2)
    scheme.restore()
    after = output_statistics(net, images)
    assert_same_moments(after, before, masks)


def test_a_restore_after_saving_and_loading_matches_the_same_moments(tmp_path):
    net, _, scheme, images = make()
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    torch.save({"model": net.state_dict(), "scheme": scheme.state_dict()}, tmp_path / "state.pth")
    other, _, loaded, _ = make(fused=False)
    saved = torch.load(tmp_path / "state.pth", weights_only=True)
    other.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["scheme"])
    loaded.restore()
    after = output_statistics(other, images)
    assert_same_moments(after, before, masks)


# --- channels that have no scale ------------------------------------------------------------------------------------


CHOSEN = [1, 4, 7, 9, 11, 12]
TINY = torch.tensor([1e-6, 1e-9, 1e-13, 1e-20, 1e-30, -1e-40])


def zero_gamma(net, beta=0.0):
    net.conv3.norm.weight[CHOSEN] = 0
    net.conv3.norm.bias[CHOSEN] = beta


def tiny_gamma(net):
    net.conv3.norm.weight[CHOSEN] = TINY


def dead_rows(net):
    net.conv3.weight[CHOSEN] = 0


def zero_variance(net):
    dead_rows(net)
    net.conv3.norm.running_var[CHOSEN] = 0


def constant_inputs(net):
    net.conv2.norm.weight.zero_()
    net.conv2.norm.bias.fill_(1)


def dead_inputs(net):
    net.conv2.norm.weight.zero_()
    net.conv2.norm.bias.zero_()


NO_SCALE = {  # what happens before the drop, and while the filters are away
    "gamma 0": (zero_gamma, None),
    "gamma 0, beta 1": (lambda net: zero_gamma(net, 1.0), None),
    "tiny gamma": (tiny_gamma, None),
    "dead at the drop": (dead_rows, None),
    "dead at the drop, variance 0": (zero_variance, None),
    "constant at both": (constant_inputs, None),
    "constant at both, tiny gamma": (lambda net: (constant_inputs(net), tiny_gamma(net)), None),
    "dead at both": (dead_inputs, None),
    "constant at the restore": (None, constant_inputs),
    "dead at the restore": (None, dead_inputs),
    "dead at the drop, constant at the restore": (dead_rows, constant_inputs),
}


@pytest.mark.parametrize("case", NO_SCALE)
def test_channels_without_a_scale_stay_finite(case, monkeypatch):
    def score(layers, _):
        scores = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
        scores["conv3"][CHOSEN] = 1
        return scores

    monkeypatch.setitem(CRITERIA, "chosen", Criterion(score))
    net, optimizer, scheme, images = make(criterion="chosen", drop_ratio=0.1)  # 6 of 64
    before_drop, before_restore = NO_SCALE[case]
    with torch.no_grad():
        before_drop and before_drop(net)
        before, old = output_statistics(net, images), buffers(net)
        scheme.drop()
        assert scheme.masks["conv3"].nonzero().flatten().tolist() == CHOSEN
        before_restore and before_restore(net)
        scheme.restore()
    after = output_statistics(net, images)
    assert np.isfinite(after["conv3"][0]).all() and np.isfinite(after["conv3"][1]).all()
    kept = [i for i in range(2 * WIDTH) if i not in CHOSEN]
    for key, value in buffers(net)["conv3"].items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value[kept], old["conv3"][key][kept]), key
    assert (net.conv3.norm.running_var >= 0).all()
    if "gamma 0" in case:  # such a channel is its beta, before and after
        for moment in range(2):
            np.testing.assert_allclose(after["conv3"][moment][CHOSEN], before["conv3"][moment][CHOSEN], atol=1e-6)
    # No channel gets out of hand either: it is at most as far from its bias as a normalised one.
    weight, bias = (old["conv3"][key].abs().max().item() for key in ("weight", "bias"))
    assert after["conv3"][1][CHOSEN].max() <= max(before["conv3"][1].max(), weight) * 1.01
    assert np.abs(after["conv3"][0][CHOSEN]).max() <= max(np.abs(before["conv3"][0]).max(), bias) + 1e-3
    train(net, optimizer, 2)
    assert torch.isfinite(net(images)).all()


class BlockNet(BottleneckBlock):
    def __init__(self) -> None:
        super().__init__(3, 2 * WIDTH, bottleneck_channels=WIDTH, norm="FrozenBN")
        self.last = nn.Conv2d(2 * WIDTH, 4, 1)

    def forward(self, x):
        return self.last(super().forward(x))

    def norm_of(self, name: str) -> nn.Module:
        return getattr(self, name).norm


@pytest.mark.parametrize("all_closed", [False, True])
def test_a_channel_whose_relu_never_opens_returns_as_one_that_opens(all_closed, monkeypatch):
    """With the moments it had it would be closed again; what is added to a shortcut may well be below 0 everywhere."""
    closed = {"conv1": [2, 5], "conv2": list(range(WIDTH)) if all_closed else [0, 7, 8], "conv3": [3]}
    chosen = {"conv1": [2, 5, 6], "conv2": [0, 7, 9], "conv3": [3, 4]}

    def score(layers, _):
        scores = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
        for name, filters in chosen.items():
            scores[name][filters] = 1
        return scores

    monkeypatch.setitem(CRITERIA, "chosen", Criterion(score))
    net, images = BlockNet(), torch.cat(batches(4, 0))
    fuse(net, images, seed=1)
    for name, filters in closed.items():
        net.norm_of(name).bias[filters] -= 50
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    scheme = RePrScheme(
        find_filter_layers(net, ["conv*"]),
        optimizer,
        criterion="chosen",
        drop_ratio=8.5 / (4 * WIDTH),
        model=net,
        passes=passes_of(net),
    )
    scheme.passes.loss(images)
    scheme.check()
    before = output_statistics(net, images)
    scheme.drop(), scheme.restore()
    after = output_statistics(net, images)
    for name, filters in chosen.items():
        stay_closed = name == "conv3" or (all_closed and name == "conv2")
        opens = [i for i in range(len(before[name][0])) if i not in closed[name]]
        for moment in range(2):
            for one in filters:
                replaced = one in closed[name] and not stay_closed
                wanted = np.sort(before[name][moment][opens])[(len(opens) - 1) // 2] if replaced else None
                wanted = before[name][moment][one] if wanted is None else wanted
                np.testing.assert_allclose(after[name][moment][one], wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_out_of_reach_of_eps_still_gets_its_mean():
    """sqrt(v + eps) >= sqrt(eps): a filter that is far too small cannot have the old deviation, but the old mean."""
    net, _, scheme, images = make(model=InsideNet)
    before = output_statistics(net, images)
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    with torch.no_grad():
        for name in LAYERS:
            getattr(net, name).weight.mul_(1e-5)  # "kept" makes the new filters as small
    scheme.restore()
    after = output_statistics(net, images)
    for name in LAYERS:
        np.testing.assert_allclose(after[name][0][masks[name]], before[name][0][masks[name]], rtol=1e-3, atol=1e-4)
        assert (after[name][1][masks[name]] <= before[name][1][masks[name]] * 1.001).all()


def test_what_follows_the_last_layer_is_not_computed():
    net, optimizer, scheme, _ = make()
    train(net, optimizer, 1)
    reached = []
    for name in (*LAYERS, "classifier"):
        getattr(net, name).register_forward_hook(lambda module, inputs, output, name=name: reached.append(name))
    scheme.drop()
    assert set(reached) == {"conv1", "conv2"}  # conv3's own hooks come after those of the norm inside it
    reached.clear()
    scheme.restore()
    assert set(reached) == {"conv1", "conv2"}


def test_layers_that_the_batches_do_not_reach_keep_their_statistics():
    class Unused(InsideNet):
        def __init__(self) -> None:
            super().__init__()
            self.conv4 = Conv2d(3, WIDTH, 1, bias=False, norm=FrozenBatchNorm2d(WIDTH))
            self.conv4.norm.running_mean.fill_(0.25)

    net, _, scheme, _ = make(Unused)
    old = {k: v.clone() for k, v in net.conv4.norm.named_buffers()}
    scheme.drop()
    assert scheme.masks["conv4"].any()
    scheme.restore()
    for key, value in net.conv4.norm.named_buffers():
        assert torch.equal(value, old[key])


class EvaluatedNorms(SiblingNet):
    """BN frozen the usual way: a ``train`` that leaves the norms in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d)
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.eval()
        return self


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("evaluating", [False, True])
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
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    train(net, optimizer, 2)
    scheme.restore()
    net.train()
    assert_same_moments(output_statistics(net, images), before, masks)
    for name in LAYERS:
        for key, value in buffers(net)[name].items():
            changed = key.startswith("running")
            rows = ~masks[name] if changed or learnable else slice(None)
            if not (learnable and not changed):
                assert torch.equal(value[rows], frozen[name][key][rows]), (name, key)


def test_bn_in_eval_mode_without_batches_is_refused_or_kept():
    net = EvaluatedNorms()
    layers, optimizer = find_filter_layers(net, ["conv*"]), torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(
        UserError,
        match=r"BN in eval mode re-calibration looks at training batches \(the norm of conv1 keeps its statistics",
    ):
        RePrScheme(layers, optimizer)
    scheme = RePrScheme(layers, optimizer, frozen_norm="keep")
    before = buffers(net)
    scheme.drop(), scheme.restore()
    for name in LAYERS:
        assert all(torch.equal(value, before[name][key]) for key, value in buffers(net)[name].items())


def test_bn_that_is_put_into_eval_mode_later_is_refused_at_the_drop():
    net = SiblingNet(nn.BatchNorm2d)
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), torch.optim.SGD(net.parameters(), 0.1))
    net.bn2.eval()
    with pytest.raises(UserError, match="the norm of conv2 keeps its statistics"):
        scheme.drop()


def with_model(with_batches: bool):
    """A net of trained BN in the sub-network phase."""
    torch.manual_seed(0)
    net = SiblingNet(nn.BatchNorm2d)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    passes = passes_of(net) if with_batches else None
    layers = find_filter_layers(net, ["conv*"])
    scheme = RePrScheme(layers, optimizer, model=net, passes=passes, criterion="random", drop_ratio=0.4)
    train(net, optimizer, 3)
    scheme.check()
    return net, optimizer, scheme


@pytest.mark.parametrize("with_batches", [False, True])
def test_who_evaluates_at_a_transition_has_not_frozen_anything(with_batches, caplog):
    """The whole model is in eval mode then, and trains in training mode."""
    net, optimizer, scheme = with_model(with_batches)
    net.eval()
    scheme.drop()
    masks = {name: mask.clone() for name, mask in scheme.masks.items()}
    net.train()
    train(net, optimizer, 2)
    net.eval()
    scheme.restore()
    for name in LAYERS:
        norm = net.norm_of(name)
        assert (norm.running_mean[masks[name]] == 0).all() and (norm.running_var[masks[name]] == 1).all()
    assert not caplog.text


@pytest.mark.parametrize("with_batches", [False, True])
def test_bn_that_is_frozen_while_filters_are_out(with_batches, caplog):
    """With batches new filters come out of it with mean 0 and deviation 1, as BN would make them; without, old ones
    return with the statistics that they had."""
    net, optimizer, scheme = with_model(with_batches)
    old = copy.deepcopy(net.state_dict())
    scheme.drop()
    masks = {name: mask.clone() for name, mask in scheme.masks.items()}
    train(net, optimizer, 2)
    for name in LAYERS:
        net.norm_of(name).eval()
    scheme.restore()
    after = output_statistics(net, torch.cat(batches(4, 0)))
    for name in LAYERS:
        rows = masks[name]
        if with_batches:
            np.testing.assert_allclose(after[name][0][rows], 0, atol=1e-4)
            np.testing.assert_allclose(after[name][1][rows], 1, atol=1e-3)
        else:
            assert torch.equal(getattr(net, name).weight[rows], old[f"{name}.weight"][rows])
            for key in ("weight", "bias", "running_mean", "running_var"):
                key = f"{name.replace('conv', 'bn')}.{key}"
                assert torch.equal(net.state_dict()[key][rows], old[key][rows]), key
            assert f"filters of {name} return as they were: its norm has been frozen since the drop" in caplog.text


def test_a_model_that_trains_in_eval_mode_keeps_its_statistics():
    """Usual in fine-tuning: BN is frozen there, and needs batches."""
    net = SiblingNet(nn.BatchNorm2d)
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    net.eval()
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, model=net)
    train(net, optimizer, 1)
    with pytest.raises(UserError, match="BN in eval mode re-calibration looks at training batches"):
        scheme.check()
    scheme.close()
    scheme = RePrScheme(find_filter_layers(net, ["conv*"]), optimizer, model=net, passes=passes_of(net))
    train(net, optimizer, 1)
    scheme.check()
    before = output_statistics(net, torch.cat(batches(4, 0)))
    scheme.drop()
    masks = {name: mask.numpy() for name, mask in scheme.masks.items()}
    scheme.restore()
    assert_same_moments(output_statistics(net, torch.cat(batches(4, 0))), before, masks)
    assert not net.training
