"""Measures the highest resident set of training steps and of transitions on the CPU, relative to each other.

    python tests/transition_memory.py resnet18 96 8 BN ortho

prints the MiB of a training step, and what a drop and a restore need more, in percent.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from repr_det import RePr
from repr_det.method.passes import TrainingPasses

NORMS = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}


def peak(action: Callable[[], object]) -> int:
    """The most bytes that were resident while ``action`` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    action()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def classifier(name: str, size: int, images: int, norm: str) -> tuple[nn.Module, Callable, Callable]:
    net = getattr(torchvision.models, name)(num_classes=10, norm_layer=NORMS[norm])
    batches = [(torch.randn(images, 3, size, size), torch.randint(10, (images,))) for _ in range(4)]

    return (
        net,
        lambda batch: F.cross_entropy(net(batch[0]), batch[1]),
        TrainingPasses(net, lambda number, cycle: batches[:number], None),
    )


def detector(size: int, images: int, norm: str) -> tuple[nn.Module, Callable, TrainingPasses]:
    """Detectron2's R50-FPN, on images of this size."""
    from detectron2 import model_zoo
    from detectron2.layers import FrozenBatchNorm2d
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cpu", norm
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.1)  # untrained, frozen norms let numbers grow

    def example() -> dict:
        truth = Instances((size, size * 4 // 3))
        truth.gt_boxes, truth.gt_classes = Boxes(torch.tensor([[10.0, 10.0, 200.0, 300.0]])), torch.tensor([1])
        return {"image": torch.randint(0, 256, (3, size, size * 4 // 3), dtype=torch.uint8), "instances": truth}

    batches = [[example() for _ in range(images)] for _ in range(4)]

    def loss(batch: list) -> torch.Tensor:
        with EventStorage(0):
            return sum(model(batch).values())

    return (
        model,
        loss,
        TrainingPasses(model, lambda number, cycle: batches[:number], loss),
    )


def measure(name: str, size: int, images: int, norm: str, criterion: str) -> tuple[int, dict[str, int]]:
    """Bytes of a training step, and of each transition."""
    torch.manual_seed(0)
    net, loss, passes = detector(size, images, norm) if name == "detector" else classifier(name, size, images, norm)
    passes.loss = loss
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-5, momentum=0.9)
    layers = ["backbone.bottom_up.res?.*conv?", "*fpn_output*"] if name == "detector" else ["*"]
    options = {"layers": layers, "criterion": criterion, "criterion_batches": 2}
    options["calibration_batches"] = math.ceil(8 / images)  # as RePrHook has it
    training = RePr(net, optimizer, 4, s1_iters=2, s2_iters=1, num_cycles=1, passes=passes, **options)
    batch = passes.batches(1, 0)[0]
    found = []

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    steps, transitions = [], {}
    for _ in range(3):
        steps.append(peak(step))
        then = peak(lambda: found.append(training.step()))
        if found[-1] is not None:
            transitions[found[-1].event] = then
    return max(steps[1:]), transitions


if __name__ == "__main__":
    name, size, images, norm, criterion = sys.argv[1:]
    step, transitions = measure(name, int(size), int(images), norm, criterion)
    more = {event: f"{100 * (found / step - 1):+.1f} %" for event, found in transitions.items()}
    print(f"{name} {size} px, {images} images, {norm}, {criterion}: a step {step / 2**20:.0f} MiB, transitions {more}")
