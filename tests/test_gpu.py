"""What a GPU may do otherwise than the CPU: waits of the host, precision, kernels that are not deterministic; several
devices. test_simulated_cuda.py runs these and the GPU cases of test_ranks.py and test_criteria.py on simulated devices.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, assert_same_weights
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from gpu_nets import BATCHES, Loop, Net, counted_waits, loss_of, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18

from repr_det import RePr, Trainer
from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters
from repr_det.method.passes import passes_over
from repr_det.network.state import random_state, set_random_state, undisturbed

pytestmark = GPU
PRECISIONS = {
    "float32": {},
    "float16 autocast": {"autocast": torch.float16},
    "bfloat16 autocast": {"autocast": torch.bfloat16},
    "float16 weights": {"dtype": torch.float16},
    "bfloat16 weights": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_masks_and_new_filters_in_every_precision_are_those_of_the_cpu(precision, norm):
    """After two cycles in which dropped filters stayed 0; of equal weights, for one seed."""
    options = PRECISIONS[precision]
    gpu = trained(Net(norm).cuda(), **options)
    cpu = trained(Net(norm), dtype=options.get("dtype", torch.float32), rate=0.0)
    cpu.net.load_state_dict(gpu.net.state_dict())
    dropped, weights = [], []
    for loop in (gpu, cpu):
        dropped.append(loop.training.scheme.drop().dropped)
        loop.training.scheme.restore()
        weights.append({name: value.cpu() for name, value in loop.net.named_parameters()})
    assert dropped[0] == dropped[1] and sum(map(len, dropped[0].values())) > 0
    assert_same_weights(*weights)


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


@pytest.mark.parametrize("returns", ["as_published", "function_preserving"])
def test_a_model_that_moves_while_filters_are_out(returns):
    loop = Loop(Net(), returns=returns)
    while loop.training.phase == "full":
        loop.step()
    loop.net.cuda()
    loop.optimizer.load_state_dict(loop.optimizer.state_dict())  # which follows the parameters
    for _ in range(24 - loop.iteration):
        loop.step()
    loop.assert_two_cycles()


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in filter(torch.is_tensor, tree_leaves(result)):
            assert one.dtype != torch.float64 or one.device.type == "cpu", function
        return result


@pytest.mark.parametrize(
    "criterion, norm", [("ortho", "FrozenBN"), ("random", "GN"), ("apoz", "BN"), ("redundant", "BN")]
)
def test_no_float64_on_the_device_and_no_kernel_that_is_not_deterministic(criterion, norm, monkeypatch):
    """The network is on the last device; the current one is the first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    net = Net(norm).to(device)
    torch.use_deterministic_algorithms(True)
    try:
        with NoFloat64():
            trained(net, criterion=criterion, returns="as_published" if norm == "BN" else "function_preserving")
    finally:
        torch.use_deterministic_algorithms(False)
    assert {parameter.device for parameter in net.parameters()} == {device}


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
    """None in an ordinary step of either phase and its passes, none in an evaluation; few in a transition."""
    torch.manual_seed(0)
    net = resnet18(num_classes=5).cuda()
    batch = torch.randn(2, 3, 32, 32).cuda(), torch.tensor([1, 2]).cuda()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    training = RePr(net, optimizer, 12, s1_iters=4, s2_iters=6, num_cycles=1, returns="function_preserving")
    # Up to the drop, the sub-network, of which dropped filters are looked at after 1, 2 and 4 steps, and the restore.
    for most in (0, 0, 0, 50, 2, 1, 0, 1, 0, 50):
        optimizer.zero_grad()
        with counted_waits() as in_training:
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
        with counted_waits() as in_repr:
            done = training.step()
        net.eval()
        with torch.no_grad(), counted_waits() as in_evaluation:
            net(batch[0])
        net.train()
        assert in_training.total() == in_evaluation.total() == 0, (in_training, in_evaluation)
        assert in_repr.total() <= most and (done is not None) == (most == 50), in_repr
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
    counts = []
    for more in ("REPR.ENABLED False", "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 4 REPR.NUM_CYCLES 1"):
        seed_all_rng(5)
        trainer = Trainer(tiny_cfg(*opts, *more.split(), "OUTPUT_DIR", tmp_path / str(len(counts))))
        steps = CountedSteps()
        trainer.register_hooks([steps])
        trainer.train()
        counts.append(steps.waits)
    ordinary = [0, 4, 7]  # no transition, no look at dropped filters or at those that have just returned
    assert statistics.median(counts[1][i] - counts[0][i] for i in ordinary) == 0, counts
    end = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert all(value.isfinite().all() for value in end.values())

    again = Trainer(trainer.cfg)
    (tmp_path / "1" / "last_checkpoint").write_text("model_0000003.pth")  # in the sub-network phase
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


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]


def drawn() -> list[list[float]]:
    return [torch.rand(5, device=device).tolist() for device in DEVICES]


@TWO
def test_extra_passes_and_a_resume_put_back_the_random_states_of_all_devices():
    net = nn.Sequential(Net(), nn.Dropout(0.5)).to("cuda:1")
    passes = passes_over(net, BATCHES, lambda batch: loss_of(net, batch))
    torch.manual_seed(5)
    state = random_state()
    expected = drawn()
    assert expected[1] == expected[2] != expected[0]  # every device has a generator of its own, by the same seed
    for disturb in (
        lambda: loss_of(net, BATCHES[0]),
        lambda: list(passes.batches(2, 0)),
        lambda: [torch.rand(3, device=device) for device in DEVICES],
    ):
        set_random_state(state)
        with undisturbed(net):
            disturb()
        assert drawn() == expected
    torch.manual_seed(7)
    set_random_state(state)  # as a resume does
    assert drawn() == expected


class Split(Net):
    """Goes on on another device behind the first block."""

    def __init__(self, norm: str) -> None:
        super().__init__(norm)
        self.to("cuda:1")
        for module in (self.conv1, self.norm1):
            module.to("cuda:0")
        self.block.register_forward_pre_hook(lambda module, inputs: inputs[0].to("cuda:1"))

    def forward(self, images):
        return super().forward(images).to("cuda:0")


@TWO
@pytest.mark.parametrize("criterion", ["ortho", "redundant", "apoz"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_layers_on_two_devices(norm, criterion):
    scheme = trained(Split(norm), criterion=criterion, averages=[Net(norm).to("cuda:1")]).training.scheme
    assert {str(layer.weight.device) for layer in scheme.layers} == {"cuda:0", "cuda:1"}


@TWO
def test_data_parallel_in_both_phases():
    net = Net().to("cuda:0")
    scheme = trained(nn.DataParallel(net, [0, 1])).training.scheme
    assert len(scheme.layers) == len([module for module in net.modules() if isinstance(module, nn.Conv2d)])
