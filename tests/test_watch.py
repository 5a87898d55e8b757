"""Training passes that are watched: which of them are traced, in what precision, and what is said of them."""

import threading

import pytest
import torch
from conftest import COMPILES, interrupt, refused
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint
from traced_nets import IMAGES, Net, build, conv, told, verdicts

from repr_det.method.errors import UserError
from repr_det.method.layers import find_filter_layers
from repr_det.method.participants import Participants
from repr_det.network.watch import Watch, by_reason

BN = nn.BatchNorm2d


def plain_net() -> nn.Sequential:
    return build(conv(), BN(16), nn.ReLU(), conv(16), BN(16), nn.ReLU())


PLAIN = {"0": ("", "1"), "3": ("", "4"), "6": ("", None)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(dtype):
    net = plain_net() if dtype == torch.bfloat16 else plain_net().double()
    images = IMAGES.to(next(net.parameters()).dtype)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        assert told(verdicts(net, lambda: net(images))) == PLAIN


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    whole = plain_net()
    net = Net(
        lambda net, x: net.rest(checkpoint(net.first, x, use_reentrant=reentrant)), first=whole[:6], rest=whole[6:]
    )
    found = told(verdicts(net, lambda: net(IMAGES.clone().requires_grad_()).sum().backward()))
    assert found == {f"first.{n}": (r, f"first.{m}") for n, (r, m) in PLAIN.items() if m} | {"rest.6": ("", None)}


@pytest.mark.filterwarnings("ignore")
@COMPILES
def test_compiled_networks():
    """The traced pass runs as it is; later ones are compiled, and see no trace any more."""
    torch._dynamo.reset()
    net = plain_net()
    compiled = torch.compile(net, backend="aot_eager")
    watch = Watch(net, list(PLAIN))
    for _ in range(2):
        compiled(IMAGES).sum().backward()
        watch.update()
    assert told(watch.verdicts) == PLAIN and watch.traced == 1
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(IMAGES), net.eval()(IMAGES))
    torch._dynamo.reset()


def test_all_passes_of_the_first_step_count():
    """Also those of parts that are called on their own, as a loss on features does: its last conv predicts then."""
    net = plain_net()
    model = Net(lambda net, x: net.head(net.body(x)), body=net[:6], head=nn.Conv2d(16, 4, 1))
    watch = Watch(model, ["body.0", "body.3"])
    watch.trace_next()  # it does already
    net(IMAGES)  # a Sequential of the same convs, which is not watched
    for part, traced in ((model, 1), (model.body, 2), (model, 3)):
        part(IMAGES)
        assert watch.traced == traced and told(watch.verdicts)["body.0"] == ("", "body.1")
        assert ("it predicts" in watch.verdicts["body.3"].reason) == (traced > 1)
    watch.update()
    model(IMAGES)
    assert watch.traced == 3


def test_a_conv_is_proved_when_it_first_runs():
    passes = []

    def run(net, x):
        passes.append(1)
        x = net.always(x).relu()
        return net.last(x + net.late(x).relu() if len(passes) > 2 else x).mean((2, 3))

    net = Net(run, always=conv(), late=conv(16), never=conv(16), last=conv(16, 4))
    watch = Watch(net, ["always", "late", "never", "last"])
    for number in range(5):
        net(IMAGES)
        if watch.has_news:
            watch.update()
        found = [name for name, verdict in watch.verdicts.items() if not verdict.reason]
        assert found == (["always"] if number < 3 else ["always", "late"])
    assert watch.traced == 2  # the first pass, and the one after the first with "late"
    assert "never (it has not run in a training pass" in " ".join(by_reason(watch.reasons()))


@pytest.mark.parametrize("micro_batches", [1, 30])
def test_tasks_in_turn_are_all_proved_and_named_once(micro_batches, caplog):
    """However many passes come before; a head that has run is traced until it runs again."""
    task = iter([0] * micro_batches + list(range(1, 30)) * 2)
    heads = nn.ModuleList(nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 2)) for _ in range(30))
    net = Net(lambda net, x: net.heads[next(task)](net.trunk(x).relu()), trunk=conv(), heads=heads)
    participants = Participants(find_filter_layers(net, ["*"]), net)
    with caplog.at_level("INFO", "repr_det"):
        for number in range(59):
            for _ in range(1 if number else micro_batches):
                net(IMAGES)
            if participants.watch.has_news:
                found = participants.update()
    assert {layer.name for layer in found} == {"trunk", *(f"heads.{number}.0" for number in range(30))}
    assert caplog.text.count("heads.29.") == 3  # two that have not run, one that predicts


def test_what_runs_once_is_waited_for_to_a_limit_and_named(caplog, monkeypatch):
    monkeypatch.setattr("repr_det.network.watch._MOST_PASSES", 4)
    run = iter([False, True] + [False] * 8)
    net = Net(lambda net, x: net.last(net.a(net.once(x) if next(run) else x)), once=conv(3, 3), a=conv(), last=conv(16))
    watch = Watch(net, ["a"])
    for _ in range(10):
        net(IMAGES)
        if watch.has_news:
            watch.update()
    assert watch.traced == 5 and caplog.text.count("RePr: once runs too seldom to be looked at") == 1


@pytest.mark.parametrize("outlasts", [True, False])
def test_one_pass_is_traced_from_its_beginning_by_its_own_thread(outlasts):
    """DataParallel: a replica that begins in the pass of another is not traced, though it outlasts that."""
    began, done = threading.Event(), threading.Event()

    def run(net, x):
        if threading.current_thread() is thread:
            began.set()
            done.wait(10)
        elif not thread.ident:
            thread.start()
            began.wait(10)
            if not outlasts:
                done.set()
                thread.join()
        return net.head(net.body(x))

    net = Net(run, body=plain_net()[:6], head=nn.Conv2d(16, 4, 1))
    thread = threading.Thread(target=net, args=(IMAGES,))
    watch = Watch(net, ["body.0", "body.3"])
    net(IMAGES)
    assert watch.traced == 1 and not watch.reasons()
    done.set()
    thread.join()
    net(IMAGES)
    assert watch.traced == 2 and not watch.reasons()


def test_only_training_passes_are_looked_at_and_what_stays_out_is_said_once(caplog):
    net = build(conv(), nn.Sigmoid(), conv(16), nn.ReLU())
    participants = Participants(find_filter_layers(net, ["*"]), net)
    with torch.no_grad():
        net(IMAGES)
    with pytest.raises(RuntimeError):  # a pass that ends in an error shows nothing
        net(IMAGES[:, :2])
    assert not participants.known
    assert "no pass of this model has been seen: give RePr the module that you call" in refused(participants.agreed)
    with caplog.at_level("INFO", "repr_det"):
        net(IMAGES)
        assert participants.known and participants.watch.has_news and participants.watch.trains
        for _ in range(2):
            assert [layer.name for layer in participants.update()] == ["2", "4"] and not participants.watch.has_news
            net(IMAGES)
    assert caplog.text.count("all filters stay of 0 (behind it comes sigmoid, which does not make 0 of") == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_an_interrupted_pass_leaves_nothing():
    """Ctrl-C, at which hooks do not run: the next pass is traced from its beginning."""
    net = build(conv(), BN(16), nn.ReLU(), nn.Sequential(conv(16), BN(16)), nn.ReLU())
    handle = net[3][1].register_forward_pre_hook(lambda *_: interrupt())
    watch = Watch(net, ["0", "3.0"])

    def interrupted(part, images):
        with pytest.raises(KeyboardInterrupt):
            part(images)
        assert _len_torch_dispatch_stack() == 1

    interrupted(net[3], torch.ones(1, 16, 8, 8))
    interrupted(net, IMAGES)
    watch.close()
    assert not _len_torch_dispatch_stack()
    watch.trace_next()
    interrupted(net, IMAGES)
    handle.remove()
    net(IMAGES)
    assert told(watch.verdicts) == {"0": ("", "1"), "3.0": ("", "3.1")} and not _len_torch_dispatch_stack()


def test_where_nothing_takes_part_what_could_is_named():
    net = build(conv(), nn.Sigmoid(), conv(16), nn.ReLU())
    participants = Participants(find_filter_layers(net, ["0"]), net)
    net(IMAGES)
    with pytest.raises(UserError, match=r"layers= names: 0 \(behind it comes sigmoid, .*\); these could: 2, 4$"):
        participants.agreed()
