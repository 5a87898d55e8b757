#!/usr/bin/env python
"""Do features that were pre-trained with RePr transfer better? A narrow ResNet-18 on CIFAR-10, probed and fine-tuned.

docs/evidence/transfer.py --data DATA --cache FOLDER --detection FOLDER [--seeds 0 1 2]

--detection is a folder with NAME/annotations/instances_{train,val}.json and NAME/{train,val}/ for bccd and raccoon.
transfer.md says what was expected, transfer.jsonl has a line for every finished run. The same command trains what is
missing; pre-trained weights lie in --cache, and are made anew where they are not. Without --data it only prints the
table.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import hooks
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.utils.env import seed_all_rng
from fine_tuning_search import ROOT, Trainer, box_ap
from modern import NETWORKS, STANDARD, TUNING_SEED, Settings, train
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from telling import interval, markdown, paired, spread
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))
from cifar import data, records, training

from repr_det import add_repr_config
from repr_det.datasets import register_builtin

FILE = Path(__file__).with_name("transfer.jsonl")
ARMS = [STANDARD, "ortho"]
STAGES = ["res2", "res3", "res4", "res5"]
WIDTH = 16
PRETRAINING = Settings(STANDARD, 0, "ResNet-18, quarter width", 50_000, 30, 128, 0.1, 5e-4, True)
ITERATIONS = 800
RATES = [0.01, 0.02, 0.04]
# data -> config, number of classes
DETECTION = {"bccd": ("bccd_r18_fpn", 3), "raccoon": ("bccd_r18_fpn", 1), "shapes": ("shapes_r18_fpn", 6)}
PROBES = ["CIFAR-10", "digits"]


def narrow_resnet18(norm: str) -> ResNet:
    """ResNet-18 at a quarter of its width."""
    stages, channels = [], WIDTH
    for index in range(4):
        filters, strides = WIDTH * 2**index, [1 if index == 0 else 2, 1]
        stages.append(
            ResNet.make_stage(
                BasicBlock, 2, stride_per_block=strides, in_channels=channels, out_channels=filters, norm=norm
            )
        )
        channels = filters
    return ResNet(BasicStem(3, WIDTH, norm), stages, out_features=STAGES)


@BACKBONE_REGISTRY.register()
def build_narrow_resnet18_fpn_backbone(cfg: CfgNode, input_shape: Any) -> FPN:
    options = cfg.MODEL.FPN
    return FPN(narrow_resnet18("FrozenBN"), STAGES, options.OUT_CHANNELS, options.NORM, LastLevelMaxPool())


class Classifier(nn.Module):
    """(N, 3, 32, 32) -> (N, 10). The images are doubled in size, so that res5 still has four places."""

    def __init__(self) -> None:
        super().__init__()
        self.larger = nn.Upsample(scale_factor=2, mode="bilinear")
        self.backbone = narrow_resnet18("BN")
        self.classes = nn.Linear(8 * WIDTH, 10)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Stage -> (N, channels), averaged over the places."""
        return {name: maps.mean((2, 3)) for name, maps in self.backbone(self.larger(images)).items()}

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(images)["res5"])


NETWORKS[PRETRAINING.network] = (Classifier, ["backbone.stem.*", "*.shortcut"])


class Study:
    """The finished runs, and how to do a missing one."""

    def __init__(self) -> None:
        lines = FILE.read_text().splitlines() if FILE.exists() else []
        self.lines = {tuple(line["run"]): line for line in map(json.loads, lines)}

    def file(self, run: tuple, found: dict[str, Any]) -> None:
        line = {"run": run, **found}
        records.append(FILE, line)
        self.lines[run] = line
        print(run, {name: value for name, value in found.items() if not isinstance(value, (list, dict))}, flush=True)

    def work(self, seeds: list[int], images: data.Cifar10, cache: Path, detection: Path) -> None:
        """Pre-trains, probes, chooses the rates with the standard network of the first seed, and fine-tunes."""
        pretrained = functools.cache(lambda arm, seed: self.pretrained(arm, seed, images, cache))
        for seed, arm in itertools.product(seeds, ARMS):
            if ("pretraining", arm, seed) not in self.lines:
                pretrained(arm, seed)
            if ("probes", arm, seed) not in self.lines:
                self.file(("probes", arm, seed), probes(pretrained(arm, seed), images))
        for name, rate in itertools.product(DETECTION, RATES):
            if (run := (name, STANDARD, TUNING_SEED, rate)) not in self.lines:
                self.file(run, fine_tuned(pretrained(STANDARD, seeds[0]), images, name, rate, TUNING_SEED, detection))
        for seed, name, arm in itertools.product(seeds, DETECTION, ARMS):
            if (run := (name, arm, seed, self.rate(name))) not in self.lines:
                self.file(run, fine_tuned(pretrained(arm, seed), images, name, self.rate(name), seed, detection))

    def pretrained(self, arm: str, seed: int, images: data.Cifar10, cache: Path) -> Classifier:
        settings = dataclasses.replace(PRETRAINING, arm=arm, seed=seed)
        weights = cache / f"narrow_resnet18_{arm}_{seed}.pt"
        model = Classifier()
        if not weights.exists():
            model, record = train(settings, images, cache)
            if ("pretraining", arm, seed) not in self.lines:
                self.file(("pretraining", arm, seed), record)
            torch.save(model.state_dict(), weights)
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()

    def rate(self, name: str) -> float | None:
        """The one with the highest AP in the runs that choose it; None before they are all there."""
        runs = {rate: self.lines.get((name, STANDARD, TUNING_SEED, rate)) for rate in RATES}
        return max(RATES, key=lambda rate: runs[rate]["AP"]) if all(runs.values()) else None

    def table(self) -> str:
        kinds = {"test accuracy of the pre-trained network": ("pretraining", "final")}
        kinds |= {f"probe of {stage}, {name}": ("probes", f"{name} {stage}") for name in PROBES for stage in STAGES}
        kinds |= {f"AP, {name}": (name, "AP") for name in DETECTION}
        lines = []
        for told, (kind, value) in kinds.items():
            arms: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
            for (of, arm, seed, *_), line in self.lines.items():
                if of == kind and seed != TUNING_SEED:
                    arms[arm][seed] = line[value]
            tests = [spread(values.values()) if values else "not yet run" for values in arms.values()]
            pairs = interval(paired(*arms.values())) if all(arms.values()) else ""
            lines.append([told, *tests, pairs])
        return markdown(["measured", "pre-trained plainly", "with RePr (ortho)", "RePr - plain (95 % CI)"], lines)


@torch.no_grad()
def probes(model: Classifier, images: data.Cifar10) -> dict[str, float]:
    """Test accuracy of a linear classifier on the features of each stage: 5,000 images of CIFAR-10, 900 digits."""
    feed = training.Feed(images.train, images.test)
    digits = load_digits()
    pixels = torch.tensor(digits.images * 255 / 16, dtype=torch.float32)[:, None]
    pixels = nn.functional.interpolate(pixels, data.SIZE, mode="bilinear").round().to(torch.uint8)
    digits = data.Images(pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous(), torch.tensor(digits.target))
    parts = {
        "CIFAR-10": (data.balanced(images.train, 5000), data.balanced(images.test, 5000)),
        "digits": (digits.take(torch.arange(900)), digits.take(torch.arange(900, len(digits)))),
    }
    found = {}
    for name, pair in parts.items():
        features = [[model.features(feed.batch(part, rows)[0]) for rows in _batches(part)] for part in pair]
        for stage in STAGES:
            train_x, test_x = (torch.cat([batch[stage] for batch in of]).numpy() for of in features)
            classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            classifier.fit(train_x, pair[0].classes.numpy())
            found[f"{name} {stage}"] = round(100 * classifier.score(test_x, pair[1].classes.numpy()), 2)
    return found


def _batches(part: data.Images) -> list[slice]:
    return [slice(first, first + 100) for first in range(0, len(part), 100)]


def fine_tuned(
    model: Classifier, images: data.Cifar10, name: str, rate: float, seed: int, folder: Path
) -> dict[str, float]:
    """Box AP of Faster R-CNN with FPN and FrozenBN that begins with the pre-trained backbone; plain training."""
    config, classes = DETECTION[name]
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{config}.yaml"))
    cfg.REPR.ENABLED = False
    feed = training.Feed(images.train, images.test)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = feed.mean.tolist(), (1 / feed.scale).tolist()
    cfg.MODEL.BACKBONE.NAME = "build_narrow_resnet18_fpn_backbone"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.MODEL.WEIGHTS = ""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = rate, ITERATIONS
    cfg.SOLVER.STEPS = (int(0.8 * ITERATIONS), int(0.934 * ITERATIONS))
    if name == "shapes":
        register_builtin()
    else:
        for part in ("train", "val"):
            if f"{name}_{part}" not in DatasetCatalog:
                annotations = folder / name / "annotations" / f"instances_{part}.json"
                register_coco_instances(f"{name}_{part}", {}, str(annotations), str(folder / name / part))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name}_train",), (f"{name}_val",)
    cfg.SEED = seed
    with tempfile.TemporaryDirectory() as output:
        cfg.OUTPUT_DIR = output
        seed_all_rng(seed)
        trainer = Trainer(cfg)
        backbone = trainer.model.backbone.bottom_up
        state = {key: value for key, value in model.backbone.state_dict().items() if "num_batches" not in key}
        backbone.load_state_dict(state)
        trainer.model.to(memory_format=torch.channels_last)
        trainer.register_hooks([hooks.LRScheduler()])
        trainer.train()
        return box_ap(cfg, trainer.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or zip file with CIFAR-10")
    parser.add_argument("--cache", type=Path, default=Path("output/cifar10/data"))
    parser.add_argument("--detection", type=Path, help="folder with bccd/ and raccoon/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    study = Study()
    if args.data is not None:
        logging.disable(logging.INFO)
        training.prepare_process()
        study.work(args.seeds, data.load(args.data, args.cache), args.cache, args.detection)
    print(study.table())


if __name__ == "__main__":
    main()
