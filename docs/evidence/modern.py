#!/usr/bin/env python
"""RePr beside standard training with weight decay, augmentation and rate drops, on CIFAR-10.

docs/evidence/modern.py STUDY --data DATA --cache FOLDER [--seeds 0 1 2]

STUDY is label_noise, resnet20 or resnet20_half. The pages here say what was expected, and STUDY.jsonl has a line for
every finished run.
The same command trains what is missing there, on any machine; without --data it only prints the table.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from telling import interval, markdown, paired, spread
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from cifar import data, records, training
from cifar import network as c3

from repr_det import RePrSchedule, RePrScheme, find_filter_layers
from repr_det.runs.files import replacing

STANDARD = "standard"
ARMS = [STANDARD, "ortho", "random"]
TUNING_SEED = 100  # of the runs that choose or check a setting, and of nothing else
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on. A later field needs a default that means what runs did before.

    Attributes:
        arm: "standard", or the criterion by which RePr drops 30 % of the filters, at most half of a conv.
        network: a name in NETWORKS.
        images: of the 50,000, equally many of each class.
        augment: pad by 4, crop, flip.
        noise: share of the training labels that are replaced by a random class, the right one among them.
        bf16: conv and linear layers in bfloat16.
        s1, s2: percent of the training in each of three cycles.
        rate_drops: percent of the training after which the learning rate is a tenth.
    """

    arm: str
    seed: int
    network: str
    images: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    augment: bool
    noise: float = 0.0
    bf16: bool = False
    s1: float = 12.0
    s2: float = 6.0
    rate_drops: tuple[float, ...] = (60.0, 80.0)

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class Block(nn.Module):
    """Two 3x3 convs with BN and a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.stride, self.more = stride, filters - channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(y + shortcut, inplace=True)


def resnet20() -> nn.Sequential:
    """(N, 3, 32, 32) -> (N, 10); He's initialisation."""
    modules: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    for channels, filters in ((16, 16), (16, 32), (32, 64)):
        modules.append(Block(channels, filters, filters // channels))
        modules += [Block(filters, filters, 1) for _ in range(2)]
    model = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for conv in c3.convs(model):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return model.to(memory_format=torch.channels_last)


# name -> what builds it, the convs that take no part in RePr
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "C3(32)": (c3.build, []),
    "ResNet-20": (resnet20, ["0"]),
}


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 32, 32, 3) uint8: padded by 4 zeros on every side, cropped at random, and flipped in half of the cases."""
    number, size = pixels.shape[:2]
    padded = F.pad(pixels, (0, 0, 4, 4, 4, 4))
    top, left = torch.randint(9, (2, number, 1), generator=generator)
    places = torch.arange(size).expand(number, size)
    flipped = torch.rand(number, 1, generator=generator) < 0.5
    columns = torch.where(flipped, size - 1 - places, places) + left
    return padded[torch.arange(number)[:, None, None], (places + top)[:, :, None], columns[:, None, :]]


def with_noise(images: data.Images, share: float, seed: int) -> data.Images:
    """The images with that share of their labels replaced by a class drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[: round(share * len(images))]
    classes = images.classes.clone()
    classes[chosen] = torch.randint(len(data.CLASSES), (len(chosen),), generator=generator)
    return data.Images(images.pixels, classes)


def train(settings: Settings, images: data.Cifar10, cache: Path) -> tuple[nn.Module, Record]:
    """The trained network and its line; accuracies in percent, "curve" on clean test images after every epoch.

    A run that is killed resumes from its last whole epoch, which lies in ``cache``.
    """
    feed = training.Feed(data.balanced(images.train, settings.images), images.test)
    noisy = with_noise(feed.train, settings.noise, settings.seed)
    torch.manual_seed(settings.seed)
    build, apart = NETWORKS[settings.network]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    per_epoch = -(-settings.images // settings.batch_size)
    steps = settings.epochs * per_epoch
    drops, restores, scheme = (), (), None
    if settings.arm != STANDARD:
        schedule = RePrSchedule(*(round(steps * share / 100) for share in (settings.s1, settings.s2)), 3)
        drops, restores = schedule.drop_iters, schedule.restore_iters
        layers = find_filter_layers(model, ["*"], apart)
        scheme = RePrScheme(layers, optimizer, criterion=settings.arm, seed=settings.seed)
    milestones = [round(steps * share / 100) for share in settings.rate_drops]
    rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    order = torch.Generator().manual_seed(settings.seed)
    record: Record = {"settings": dataclasses.asdict(settings), "curve": [], "train_curve": [], "seconds": 0.0}
    parts = {"model": model, "optimizer": optimizer, "rate": rate, **({"scheme": scheme} if scheme else {})}
    kept = cache / f"{hashlib.sha256(settings.key.encode()).hexdigest()[:12]}.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        order.set_state(state["order"])
        record = state["record"]
    iteration = len(record["curve"]) * per_epoch
    for epoch in range(len(record["curve"]) + 1, settings.epochs + 1):
        began = time.perf_counter()
        model.train()
        right = 0
        for rows in torch.randperm(len(noisy), generator=order).split(settings.batch_size):
            part = noisy.take(rows)
            if settings.augment:
                part = data.Images(augmented(part.pixels, order), part.classes)
            batch, classes = feed.batch(part, slice(None))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                logits = model(batch)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), classes).backward()
            optimizer.step()
            rate.step()
            right += int((logits.argmax(1) == classes).sum())
            if iteration in drops:
                scheme.drop()
            elif iteration in restores:
                scheme.restore()
            iteration += 1
        record["train_curve"].append(round(100 * right / len(noisy), 2))
        record["curve"].append(training.accuracy(model, feed, feed.test))
        record["seconds"] += time.perf_counter() - began
        if epoch < settings.epochs:
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(kept, "wb") as whole:
                torch.save({**state, "order": order.get_state(), "record": record}, whole)
    kept.unlink(missing_ok=True)
    ends = {"final": record["curve"][-1], "best": max(record["curve"]), "seconds": round(record["seconds"])}
    return model, {**record, **ends, "torch": torch.__version__}


class Study(ABC):
    """The runs of one question: which there are, which are finished, and their table."""

    name: str

    def __init__(self, folder: Path = Path(__file__).parent) -> None:
        self.file = folder / f"{self.name}.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.records = {Settings(**r["settings"]).key: r for r in map(json.loads, lines)}

    @abstractmethod
    def runs(self, seeds: Iterable[int]) -> Iterable[Settings]:
        """The runs in the order in which they are trained. A later one may depend on the records of earlier ones."""

    def train_missing(self, seeds: Iterable[int], images: data.Cifar10, cache: Path) -> None:
        for settings in self.runs(seeds):
            if settings.key not in self.records:
                _, record = train(settings, images, cache)
                records.append(self.file, record)
                self.records[settings.key] = record
                print(f"{settings.key}: {record['final']:.1f}, {record['seconds']} s", flush=True)

    def table(self) -> str:
        """A line for each arm: final and best test accuracy, and differences to the standard network by seed."""
        found = [settings for settings in self.runs(range(20)) if settings.key in self.records]
        arms = {
            arm: {s.seed: self.records[s.key] for s in found if s.arm == arm and s.seed < TUNING_SEED} for arm in ARMS
        }
        lines = []
        for arm, of_seeds in arms.items():
            line = [arm, str(len(of_seeds))]
            for value in ("final", "best"):
                values = {seed: record[value] for seed, record in of_seeds.items()}
                standard = {seed: record[value] for seed, record in arms[STANDARD].items()}
                line += [spread(values.values()) if values else "not run"]
                line += ["" if arm == STANDARD or not values else interval(paired(standard, values))]
            fit = [record["train_curve"][-1] for record in of_seeds.values()]
            lines.append([*line, f"{statistics.mean(fit):.0f}" if fit else ""])
        head = ["arm", "seeds", "last epoch", "arm - standard (95 % CI)", "best epoch", "arm - standard (95 % CI)"]
        return markdown([*head, "training accuracy"], lines)


def in_all_arms(settings: Settings, seeds: Iterable[int]) -> Iterable[Settings]:
    for seed, arm in itertools.product(seeds, ARMS):
        yield dataclasses.replace(settings, arm=arm, seed=seed)


class LabelNoise(Study):
    """40 % of the labels replaced: weight decay and augmentation are chosen for the standard network first."""

    name = "label_noise"
    base = Settings(STANDARD, TUNING_SEED, "C3(32)", 25_000, 40, 64, 0.01, 0.0, False, noise=0.4)

    def runs(self, seeds: Iterable[int]) -> Iterable[Settings]:
        grid = [
            dataclasses.replace(self.base, weight_decay=decay, augment=augment)
            for decay, augment in itertools.product([0.0, 1e-3, 4e-3], [False, True])
        ]
        yield from grid
        tuned = max(grid, key=lambda settings: self.records.get(settings.key, {"final": 0})["final"])
        yield from in_all_arms(tuned, seeds)


class ResNet20(Study):
    """The paper's row: BN, augmentation, weight decay 1e-4, rate drops after the last restore. Four short runs come
    first that hold bfloat16 against float32."""

    name = "resnet20"
    base = Settings(
        STANDARD, 0, "ResNet-20", 50_000, 75, 128, 0.1, 1e-4, True, s1=16.0, s2=8.0, rate_drops=(75.0, 88.0), bf16=True
    )

    def runs(self, seeds: Iterable[int]) -> Iterable[Settings]:
        for arm, bf16 in itertools.product([STANDARD, "ortho"], [False, True]):
            yield dataclasses.replace(self.base, arm=arm, seed=TUNING_SEED, images=10_000, epochs=15, bf16=bf16)
        yield from in_all_arms(self.base, seeds)


class HalfResNet20(ResNet20):
    """The same in half as many epochs and float32, for CPUs without bfloat16."""

    name = "resnet20_half"
    base = dataclasses.replace(ResNet20.base, epochs=37, bf16=False)

    def runs(self, seeds: Iterable[int]) -> Iterable[Settings]:
        return in_all_arms(self.base, seeds)


STUDIES = {study.name: study for study in (LabelNoise, ResNet20, HalfResNet20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="folder or zip file with the images; without it nothing is trained")
    parser.add_argument(
        "--cache", type=Path, default=Path("output/cifar10/data"), help="for decoded images and unfinished runs"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    study = STUDIES[args.study]()
    if args.data is not None:
        training.prepare_process()
        study.train_missing(args.seeds, data.load(args.data, args.cache), args.cache)
    print(study.table())


if __name__ == "__main__":
    main()
