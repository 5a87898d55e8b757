"""Whatever is made of a slim network is a normal one with the weights it holds, and so is the network itself where its
dropped filters are not zero any more."""

import copy
import io
import pickle

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import repr_det.detectron.blocks  # noqa: F401
from repr_det import RePrScheme, UserError, find_filter_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(kind: str, norm: str = "BN") -> nn.Module:
    torch.manual_seed(0)
    if kind == "basic":
        return nn.Sequential(BasicBlock(3, 32, norm=norm), BasicBlock(32, 32, norm=norm))
    if kind == "bottleneck":
        return nn.Sequential(BottleneckBlock(3, 64, bottleneck_channels=32, norm=norm))
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU())


def assert_equal(a, b):
    assert torch.equal(a, b)


KINDS = ["basic", "bottleneck", "plain"]


def step(net, opt):
    opt.zero_grad()
    net(IMAGES).square().mean().backward()
    opt.step()


def slim(kind, norm="BN"):
    net = build(kind, norm)
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, momentum=0.9)
    layers = find_filter_layers(net, ["*conv*"] if kind != "plain" else ["*"])
    scheme = RePrScheme(layers, opt, drop_ratio=0.4, slim_model=net, frozen_norm="keep")
    step(net, opt)
    full = copy.deepcopy(net.state_dict())
    scheme.drop()
    step(net, opt)
    assert is_slim(net)
    return net, opt, scheme, full


def is_slim(net):
    return any(module.__dict__.get("_compiled_call_impl") is not None for module in net.modules())


def stock(net, kind, norm="BN"):
    """The same weights in a network that nobody has touched."""
    other = build(kind, norm)
    other.load_state_dict(net.state_dict())
    return other.train(net.training)


def through_a_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_a_file,
    "shallow": lambda net: nn.Sequential(*(copy.copy(module) for module in net)),
    "AveragedModel": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.0)).module,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", COPIES)
def test_copies_are_normal_networks(kind, clone):
    net, _, _, full = slim(kind)
    twin = COPIES[clone](net)
    assert is_slim(net)
    if clone != "shallow":  # the modules inside are the same ones
        assert not is_slim(twin)
        torch.testing.assert_close(twin(IMAGES), copy.deepcopy(net)(IMAGES))
        twin.load_state_dict(full)
    same = torch.testing.assert_close if clone == "shallow" else assert_equal
    same(twin.eval()(IMAGES), stock(twin, kind)(IMAGES))
    for module in twin.modules():
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, None)


def test_an_average_that_outlives_the_restore():
    net, opt, scheme, _ = slim("basic")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    scheme.restore()
    step(net, opt)
    average.update_parameters(net)
    assert torch.equal(average.eval()(IMAGES), net.eval()(IMAGES))


EXPORTS = {
    "trace": lambda net: torch.jit.trace(net, (IMAGES,)),
    "script": torch.jit.script,
    "export": lambda net: torch.export.export(net, (IMAGES,)).module(),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_hold_a_normal_network(export):
    """Full weights put into the exported sub-network count in full."""
    net, _, _, full = slim("plain")
    net.eval()
    exported = EXPORTS[export](net)
    torch.testing.assert_close(exported(IMAGES), net(IMAGES))
    exported.load_state_dict(full)
    wanted = build("plain")
    wanted.load_state_dict(full)
    torch.testing.assert_close(exported(IMAGES), wanted.eval()(IMAGES))


def test_symbolic_traces_and_compiled_networks():
    net, _, _, _ = slim("plain")
    net.eval()
    wanted = net(IMAGES)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(IMAGES), wanted)
    torch.testing.assert_close(torch.compile(net, backend="eager")(IMAGES), wanted)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", ""])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("training", [True, False])
def test_full_weights_loaded_into_the_live_network(kind, norm, training, caplog):
    net, _, scheme, full = slim(kind, norm)
    sub = copy.deepcopy(net.state_dict())
    net.train(training)
    net.load_state_dict(full)
    assert caplog.text.count("dropped filters are not zero any more (first seen: 0.conv1)") == 1
    wanted = stock(net, kind, norm)
    assert torch.equal(net(IMAGES), wanted(IMAGES))
    with pytest.raises(UserError, match=r"dropped filters of 0\.conv1 are not zero any more at the restore of cycle 1"):
        scheme.restore()
    net.load_state_dict(sub)  # whoever has looked at other weights and goes on
    torch.testing.assert_close(net(IMAGES), stock_output(sub, kind, norm, training))
    scheme.restore()
    assert not is_slim(net)


def stock_output(state, kind, norm, training):
    other = build(kind, norm)
    other.load_state_dict(state)
    return other.train(training)(IMAGES)


def one_layer(net, state):
    """Only the last conv of a block and its norm."""
    for key, value in net.state_dict().items():
        if "conv2" in key:
            value.copy_(state[key])


def by_data(net, state):
    for parameter, name in zip(net.parameters(), dict(net.named_parameters()), strict=True):
        parameter.data = state[name].clone()


def part(net, state):
    net[0].load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("0.")})


def assigned(net, state):
    net.load_state_dict(state, assign=True)


@pytest.mark.parametrize("write", [one_layer, by_data, part, assigned])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_other_ways_to_write_weights(write, kind):
    net, _, _, full = slim(kind)
    write(net, full)
    torch.testing.assert_close(net(IMAGES), stock(net, kind)(IMAGES))


def test_a_call_with_other_parameters():
    net, _, _, full = slim("basic")
    given = {name: full[name] for name, _ in net.named_parameters()}
    state = copy.deepcopy(net.state_dict())
    found = torch.func.functional_call(net.eval(), given, (IMAGES,))
    wanted = build("basic")
    wanted.load_state_dict({**state, **given})
    assert torch.equal(found, wanted.eval()(IMAGES))
    torch.testing.assert_close(net(IMAGES), stock(net, "basic")(IMAGES))


class SaysCuda(torch.Tensor):
    is_cuda = True


def test_on_a_gpu_training_goes_by_the_last_look(monkeypatch):
    """Without a GPU here: rows that say they are on one."""
    net, opt, _, _ = slim("basic")
    forwards = net[0]._compiled_call_impl.forward, net[0].conv1._compiled_call_impl.forward
    zeros = forwards[0].zeros
    looks = []
    for each in zeros:
        monkeypatch.setattr(each, "look", lambda each=each: looks.append(each) or type(each).look(each))
        monkeypatch.setattr(each, "rows", SaysCuda(each.rows))
    step(net, opt)
    assert not looks and all(forward.takes(IMAGES) for forward in forwards)
    zeros[1].broken = True
    assert not any(forward.takes(IMAGES) for forward in forwards)
    with torch.no_grad():
        assert all(forward.takes(IMAGES) for forward in forwards) and looks


def test_forward_methods_called_by_themselves():
    net, _, _, _ = slim("bottleneck")
    block = net[0].eval()
    wanted = block(IMAGES)
    torch.testing.assert_close(block.forward(IMAGES), wanted)
    first = block.conv1(IMAGES)
    for conv in (block.conv1, block.conv3):
        conv._compiled_call_impl = lambda x, conv=conv: type(conv).forward(conv, x)
        torch.testing.assert_close(block(IMAGES), wanted)
    assert first.shape[1] < block.conv1(IMAGES).shape[1]
