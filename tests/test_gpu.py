"""What a GPU may do otherwise than the CPU: waits of the host, precision, kernels that are not deterministic.

``pytest -m gpu`` runs these, test_gpu_devices.py and the GPU cases of test_ranks.py;
test_simulated_cuda.py runs them on simulated devices.
"""

import statistics
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, assert_same_weights
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from gpu_nets import BATCHES, Loop, Net, counted_waits, loss_of, trained
from textbook import textbook_overlap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18

from repr_det import RePr, Trainer
from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters

pytestmark = GPU
LOOKS = {1, 2, 4, 8, 16, 32, 64}  # steps of the sub-network after which dropped filters are looked at
PRECISIONS = {
    "float32": {},
    "float16 autocast": {"autocast": torch.float16},
    "bfloat16 autocast": {"autocast": torch.bfloat16},
    "float16 weights": {"dtype": torch.float16},
    "bfloat16 weights": {"dtype": torch.bfloat16},
}
# How much weights are off by rounding.
ROUNDING = {"float16 weights": 2.0**-11, "bfloat16 weights": 2.0**-8}


def until(loop: Loop, event: str):
    """The next transition of this kind, and the weights of just before and after it, by the name of the layer."""
    schedule, before = loop.training.schedule, {}
    while loop.iteration not in (schedule.drop_iters if event == "drop" else schedule.restore_iters):
        loop.step()
    handle = loop.optimizer.register_step_post_hook(lambda *_: before.update(weights_of(loop)))
    done, _ = loop.step()
    handle.remove()
    return done, before, weights_of(loop)


def weights_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight.detach().cpu().clone() for layer in loop.training.scheme.layers}


def worst(scores: dict[str, np.ndarray], ratio: float = 0.3, most: float = 0.5) -> set[tuple[str, int]]:
    """The worst share over all layers, at most half of one."""
    ranked = sorted(((score, name, i) for name, own in scores.items() for i, score in enumerate(own)), reverse=True)
    taken: Counter[str] = Counter()
    chosen: set[tuple[str, int]] = set()
    for _, name, i in ranked:
        if len(chosen) < int(ratio * len(ranked)) and taken[name] < int(np.ceil(most * len(scores[name]))):
            chosen.add((name, i))
            taken[name] += 1
    return chosen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_masks_zeros_and_directions_in_every_precision(precision, norm):
    """Which filters go is decided by the weights alone, and where they come back is orthogonal after rounding."""
    loop = Loop(Net(norm).cuda(), **PRECISIONS[precision])
    for _ in range(2):
        done, old, _ = until(loop, "drop")
        groups = {layer.name: layer.conv.groups for layer in loop.training.scheme.layers}
        scores = {name: textbook_overlap(weight, groups[name]) for name, weight in old.items()}
        assert {(name, i) for name, rows in done.dropped.items() for i in rows} == worst(scores)
        done, before, after = until(loop, "restore")
        for name, rows in done.dropped.items():
            new, size = after[name], after[name][0].numel()
            kept = [i for i in range(len(new)) if i not in rows]
            others = torch.cat([before[name][kept], old[name][rows]]).double().flatten(1)
            if groups[name] == 1 and len(new) + len(rows) <= size:  # a null space
                units = [F.normalize(part, dim=1) for part in (new[rows].double().flatten(1), others)]
                cosines = torch.cat([units[0] @ units[1].T, units[0] @ units[0].T - torch.eye(len(rows))], 1)
                assert cosines.abs().max() <= 2 * ROUNDING.get(precision, 1e-6), name
    loop.assert_two_cycles()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_steps_that_grad_scaler_skips_around_transitions(norm):
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, backoff_factor=2.0**-40)
    loop = Loop(Net(norm).cuda(), autocast=torch.float16, scaler=scaler)
    scaler.scale(torch.zeros(1, device="cuda"))  # before which it has no scale to be changed
    schedule = loop.training.schedule
    skipped = {schedule.drop_iters[0], schedule.drop_iters[0] + 1, schedule.restore_iters[0]}
    for i in range(24):
        scaler.update(2.0**60 if i in skipped else 2.0**10)
        _, stepped = loop.step()
        assert stepped == (i not in skipped)
    loop.assert_two_cycles()


class Float64(TorchDispatchMode):
    """Notes operations that make a tensor of float64 on a device other than the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if torch.is_tensor(one) and one.dtype == torch.float64 and one.device.type != "cpu":
                self.found.append(str(function))
        return result


@pytest.mark.parametrize(
    "criterion, norm", [("ortho", "FrozenBN"), ("random", "GN"), ("apoz", "BN"), ("redundant", "BN")]
)
def test_no_float64_on_the_device_and_no_kernel_that_is_not_deterministic(criterion, norm, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with Float64() as seen:
            trained(Net(norm).cuda(), criterion=criterion)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not seen.found


@pytest.mark.parametrize("kind", ["fused", "capturable"])
def test_optimizers_whose_state_is_on_the_device(kind):
    net = Net().cuda()
    rate = torch.tensor(1e-3, device="cuda") if kind == "capturable" else 1e-3
    optimizer = torch.optim.AdamW(net.parameters(), rate, **{kind: True})
    training = RePr(net, optimizer, 24, num_cycles=1)
    for step in range(24):
        optimizer.zero_grad()
        loss_of(net, BATCHES[step % 4]).backward()
        optimizer.step()
        with counted_waits() as waits:
            done = training.step()
        assert waits.total() <= (50 if done else 3), waits
    assert training.scheme.cycle == 1


def test_waits_of_a_resnet18():
    """None in an ordinary step of either phase, in a backward pass or in an evaluation; few in a transition."""
    torch.manual_seed(0)
    net = resnet18(num_classes=5).cuda()
    batch = torch.randn(2, 3, 32, 32).cuda(), torch.tensor([1, 2]).cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    training = RePr(net, optimizer, 12, s1_iters=4, s2_iters=6, num_cycles=1, returns="function_preserving")
    sub_steps = 0
    for _ in range(12):
        optimizer.zero_grad()
        phase = training.phase
        with counted_waits() as in_training:
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
        with counted_waits() as in_repr:
            done = training.step()
        assert in_training.total() == 0, in_training
        sub_steps = sub_steps + 1 if phase == "sub" else 0
        if done is not None:
            assert in_repr.total() <= 50, (done.event, in_repr)
        elif phase == "sub":
            most = {1: 2, **dict.fromkeys(LOOKS - {1}, 1)}.get(sub_steps, 0)
            assert in_repr.total() <= most, (sub_steps, in_repr)
        elif training.scheme.cycle == 0:
            assert in_repr.total() == 0, in_repr
        if training.phase == "sub":
            net.eval()
            with torch.no_grad(), counted_waits() as in_evaluation:
                net(batch[0])
            net.train()
            assert in_evaluation.total() == 0, in_evaluation
    assert training.scheme.cycle == 1


class CountedSteps(HookBase):
    """The waits of every step, its hooks included, up to where this hook stands: the writers' are not counted."""

    def __init__(self) -> None:
        self.waits: list[int] = []

    def before_step(self) -> None:
        self._counted = counted_waits()
        self._found = self._counted.__enter__()

    def after_step(self) -> None:
        self._counted.__exit__(None, None, None)
        self.waits.append(self._found.total())


def test_a_detectors_steps_wait_as_often_as_without_repr_and_a_cycle_is_resumed(tiny_cfg, tmp_path):
    opts = "SOLVER.MAX_ITER 8 DATASETS.TEST () SOLVER.BASE_LR 0.0001 SOLVER.CHECKPOINT_PERIOD 4".split()
    opts += ["MODEL.DEVICE", "cuda", "MODEL.RESNETS.NORM", "FrozenBN"]
    cycle = "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 4 REPR.NUM_CYCLES 1".split()
    counts = {}
    for name, more in (("without", []), ("with", cycle)):
        seed_all_rng(5)
        trainer = Trainer(tiny_cfg(*opts, *more, "OUTPUT_DIR", tmp_path / name))
        steps = CountedSteps()
        trainer.register_hooks([steps])
        trainer.train()
        counts[name] = steps.waits
    ordinary = [0, 4, 7]  # no transition, no look at dropped filters or at those that have just returned
    added = [counts["with"][i] - counts["without"][i] for i in ordinary]
    assert statistics.median(added) == 0, (added, counts)
    end = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert all(value.isfinite().all() for value in end.values())

    again = Trainer(trainer.cfg)
    (tmp_path / "with" / "last_checkpoint").write_text("model_0000003.pth")  # in the sub-network phase
    again.resume_or_load(resume=True)
    assert again.start_iter == 4
    again.train()
    for key, value in again.model.state_dict().items():
        assert torch.allclose(value, end[key], rtol=1e-3, atol=1e-5), key


def test_metric_and_new_filters_are_those_of_the_cpu():
    """512 x 512 x 3 x 3: the largest 3x3 layer of R50."""
    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inter_filter_orthogonality(weight.cuda()), inter_filter_orthogonality(weight))
    kept, dropped = weight[:358], weight[358:]
    new = least_overlap_filters(kept.cuda(), dropped.cuda(), torch.Generator().manual_seed(1))
    assert new.is_cuda
    assert torch.equal(new.cpu(), least_overlap_filters(kept, dropped, torch.Generator().manual_seed(1)))


def test_same_masks_and_filters_for_one_seed():
    """Of equal weights, whatever device they are on."""
    found = []
    for place in ("cpu", "cuda"):
        loop = Loop(Net().to(place), rate=0.0)
        loop.step()
        dropped = loop.training.scheme.drop().dropped
        loop.training.scheme.restore()
        found.append((dropped, {name: value.cpu() for name, value in loop.net.named_parameters()}))
    assert found[0][0] == found[1][0] and sum(map(len, found[0][0].values())) > 0
    assert_same_weights(found[0][1], found[1][1])
