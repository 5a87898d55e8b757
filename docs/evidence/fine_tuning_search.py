#!/usr/bin/env python
"""The search for a form of RePr that helps when a trained backbone is fine-tuned: one run from a JSON description.

docs/evidence/fine_tuning_search.py --data FOLDER --weights thin_resnet50.pkl --results search.jsonl '{"name": ...}'

A description is one run: a half-width R50-FPN with ImageNet weights and FrozenBN (stem and res2 frozen), about
176 px, batch 4, SGD with warm-up and two steps, one thread, bf16 autocast in training unless the description says
otherwise. A run that the results hold already is skipped, so a list of commands that was killed is given again. What
a description may say, besides name and seed:

    data         "raccoon" or "bccd": FOLDER/NAME/annotations/instances_{train,val}.json, FOLDER/NAME/{train,val}/;
                 "shapes": all 600 embedded ones instead, from random weights by configs/demo_r50_fpn.yaml (R50-FPN at a
                 quarter of its width, BN)
    iterations   800
    steps        shares of the iterations at which the rate falls to a tenth, [0.8, 0.934]
    fp32         true: no autocast, which on a CPU without AVX-512 takes ten times as long as float32
    copies       share of the filters of conv1 and conv2 that begin as copies, see ``fine_tuning_plant``
    noise        share of the training boxes that are removed (half of it) or shifted by up to 30 % (the other half)
    cfg          config keys, REPR among them
    old          true: RePrHook brings the filters back as they were
    cycle        removal by this file instead of RePrHook, see ``fine_tuning_hooks.Cycle``
    distill      {"at", "until", "weight"}: losses against the network of these iterations, see
                 ``fine_tuning_hooks.Distillation``
    average      name -> {"decay"} or {"start", "every"}: exponential or uniform averages of the weights, evaluated too
    cosine       iterations at which a cosine rate restarts, instead of the steps
"""

import argparse
import fcntl
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fine_tuning_hooks import AsTheyWere, Average, CosineRestarts, Cycle, Distillation
from fine_tuning_plant import plant_copies
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from saliency import SALIENCY

from repr_det import RePrHook, add_repr_config
from repr_det.datasets import register_builtin

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.WIDTH_PER_GROUP 32 MODEL.RESNETS.RES2_OUT_CHANNELS 128
MODEL.RESNETS.STRIDE_IN_1X1 True MODEL.RESNETS.NORM FrozenBN MODEL.BACKBONE.FREEZE_AT 2 MODEL.FPN.NORM ''
MODEL.PIXEL_MEAN [104,117,123] MODEL.PIXEL_STD [1,1,1] MODEL.ROI_BOX_HEAD.NUM_FC 2 INPUT.MIN_SIZE_TRAIN (160,176,192)
INPUT.MIN_SIZE_TEST 176 INPUT.MAX_SIZE_TRAIN 320 INPUT.MAX_SIZE_TEST 320 SOLVER.BASE_LR 0.01 REPR.ENABLED False
TEST.DETECTIONS_PER_IMAGE 50
""".split()
CLASSES = {"raccoon": 1, "bccd": 3}


def config_of(run: dict[str, Any], data: Path, weights: Path, output: Path) -> CfgNode:
    cfg = get_cfg()
    add_repr_config(cfg)
    iterations, name = run.get("iterations", 800), run.get("data", "raccoon")
    if name == "shapes":
        register_builtin()
        cfg.merge_from_file(str(ROOT / "configs" / "demo_r50_fpn.yaml"))
        cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_train",), "REPR.ENABLED", False])
    else:
        cfg.merge_from_file(str(ROOT / "configs" / "bccd_r18_fpn.yaml"))
        cfg.merge_from_list([*SETTINGS, "MODEL.WEIGHTS", str(weights), "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES[name]])
        for part in ("train", "val"):
            path = data / name / "annotations" / f"instances_{part}.json"
            if part == "train" and run.get("noise"):
                path = with_label_noise(path, run["noise"], run["seed"], output)
            register_coco_instances(part, {}, str(path), str(data / name / part))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.STEPS = tuple(int(iterations * share) for share in run.get("steps", (0.8, 0.934)))
    cfg.SEED, cfg.OUTPUT_DIR = run["seed"], str(output)
    for key, value in run.get("cfg", {}).items():
        cfg.merge_from_list([key, value])
    return cfg


def with_label_noise(path: Path, share: float, seed: int, output: Path) -> Path:
    """The annotations with a share of the boxes removed or shifted; the same for all runs of a seed."""
    content, rng, kept = json.loads(path.read_text()), np.random.RandomState(1000 + seed), []
    for box in content["annotations"]:
        if rng.rand() < share:
            if rng.rand() < 0.5:
                continue
            x, y, width, height = box["bbox"]
            dx, dy = rng.uniform(-0.3, 0.3, 2)
            box["bbox"] = [x + dx * width, y + dy * height, width, height]
        kept.append(box)
    noisy = output / "noisy.json"
    noisy.write_text(json.dumps(content | {"annotations": kept}))
    return noisy


class Trainer(DefaultTrainer):
    """Without writers, checkpoints and evaluations on the way."""

    def build_hooks(self) -> list[HookBase]:
        return [hooks.IterationTimer()]

    def build_writers(self) -> list:
        return []


def box_ap(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    model.eval()
    (name,) = cfg.DATASETS.TEST
    evaluator = COCOEvaluator(name, output_dir=None)
    with EventStorage(0):
        found = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)["bbox"]
    return {name: round(float(found[name]), 2) for name in ("AP", "AP50", "AP75")}


def train(run: dict[str, Any], cfg: CfgNode) -> dict[str, Any]:
    seed_all_rng(cfg.SEED)
    start = time.time()
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    model = trainer.model
    if "copies" in run:
        plant_copies(model, run["copies"])
    channels_last(model, bf16=not run.get("fp32", False))
    scheduling = CosineRestarts([*run["cosine"], cfg.SOLVER.MAX_ITER]) if "cosine" in run else hooks.LRScheduler()
    trainer.register_hooks([scheduling])
    if "distill" in run:
        trainer.register_hooks([Distillation(run["distill"])])
    if cfg.REPR.ENABLED:
        trainer.register_hooks([repr_hook(cfg), *([AsTheyWere()] if run.get("old") else [])])
    if "cycle" in run:
        trainer.register_hooks([Cycle(run["cycle"], run["seed"])])
    averages = {name: Average(**options) for name, options in run.get("average", {}).items()}
    trainer.register_hooks(averages.values())
    trainer.train()
    found = {"loss": round(float(trainer.storage.history("total_loss").avg(100)), 4)} | box_ap(cfg, model)
    for name, average in averages.items():
        model.load_state_dict(average.state)
        found.setdefault("average", {})[name] = box_ap(cfg, model)
    return found | {"minutes": round((time.time() - start) / 60, 1)}


def repr_hook(cfg: CfgNode) -> RePrHook:
    """RePr of the config, whose criterion may be one of examples/saliency.py."""
    criterion = cfg.REPR.CRITERION
    if criterion not in SALIENCY:
        return RePrHook(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.REPR.CRITERION = "ortho"
    return RePrHook(**RePrHook.from_config(cfg) | {"criterion": SALIENCY[criterion]})


def channels_last(model: nn.Module, bf16: bool) -> None:
    """Channels last and, if ``bf16``, autocast in training: half the time on a CPU that has bf16 instructions."""
    model.to(memory_format=torch.channels_last)
    forward, preprocess = model.forward, model.preprocess_image

    def preprocess_image(batch: list[dict]) -> Any:
        images = preprocess(batch)
        images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
        return images

    def autocast(batch: list[dict]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and model.training):
            return forward(batch)

    model.forward, model.preprocess_image = autocast, preprocess_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("run", type=json.loads, help="a description")
    args = parser.parse_args()
    run = args.run
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    args.results.touch()
    done = [json.loads(line)["run"] for line in args.results.read_text().splitlines()]
    if any((one["name"], one["seed"]) == (run["name"], run["seed"]) for one in done):
        print(f"{run['name']}, seed {run['seed']}: done already")
        return
    output = args.results.parent / "runs" / f"{run['name']}_{run['seed']}"
    output.mkdir(parents=True, exist_ok=True)
    found = train(run, config_of(run, args.data, args.weights, output))
    with args.results.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"run": run} | found) + "\n")
    print(run["name"], run["seed"], found)


if __name__ == "__main__":
    main()
