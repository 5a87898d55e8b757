"""Made-up finished runs on the tiny images, for the tests of the comparison."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

from repr_det.datasets import register_coco_format
from repr_det.studies.comparison.command import main

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
REPR_CONFIG, BASELINE_CONFIG = (str(ROOT / "configs" / f"{arm}_r50_fpn.yaml") for arm in ("repr", "baseline"))
# Settings of the made-up runs, and the KEY VALUE pairs of a comparison that takes them for its own.
OWN = "SOLVER.MAX_ITER 40 TEST.EVAL_PERIOD 20 DATASETS.TRAIN ('odd_train',) DATASETS.TEST ('odd_val',)".split()
_SEED = SMALL.index("SEED")
OPTS = [*SMALL[:_SEED], *SMALL[_SEED + 2 :], *OWN]


def write_lines(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def named_data(tmp_path_factory, tiny_data):
    """The tiny images, all of one base name, with class names that HTML and file formats trip over, registered as
    odd_train and odd_val."""
    path = tmp_path_factory.mktemp("odd") / "odd.json"
    images = path.with_name("images")
    content = json.loads((tiny_data / "tiny.json").read_text())
    content["categories"] = [dict(id=1, name="<b>bläu & “x”</b>"), dict(id=2, name="绿色/$g$")]
    for image in content["images"]:
        folder = images / str(image["id"])
        folder.mkdir(parents=True)
        (folder / "image.png").symlink_to(tiny_data / "images" / image["file_name"])
        image["file_name"] = f"{folder.name}/image.png"
    path.write_text(json.dumps(content), encoding="utf-8")
    for name in ("odd_train", "odd_val"):
        register_coco_format(name, str(path), str(images))
    return path, images


@pytest.fixture
def finished(named_data, tiny_cfg, tmp_path):
    """``finished(arm, seed, KEY, VALUE, ...)`` -> the folder of a made-up finished run of 40 iterations."""
    truth = json.loads(named_data[0].read_text(encoding="utf-8"))

    def make(arm, seed, *opts, ap=None, folder=None):
        folder = folder or tmp_path / f"{arm}_{seed}"
        (folder / "inference").mkdir(parents=True)
        own = [*OWN, "SEED", seed, "REPR.ENABLED", arm == "repr", "OUTPUT_DIR", folder]
        (folder / "config.yaml").write_text(tiny_cfg(*own, *opts, config="repr_r50_fpn.yaml").dump())
        rng = np.random.default_rng(abs(seed) + 100 * (arm == "repr"))
        detections = [dict(one, score=float(rng.uniform(0.4, 1))) for one in truth["annotations"]]
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        names = [*METRICS, *(f"AP-{category['name']}" for category in truth["categories"])]
        final = {f"bbox/{name}": float(rng.uniform(20, 60)) for name in names}
        final["bbox/APl"] = math.nan  # images of 96 px hold no large object
        if ap is not None:
            final["bbox/AP"] = ap
        again = {"iteration": 19, "bbox/AP": final["bbox/AP"] + 1}  # of a run that was killed and resumed
        metrics = folder / "metrics.json"
        longer = {"iteration": 60, "bbox/AP": 99.0}  # of a run before it in this folder
        write_lines(metrics, longer, {"iteration": 19, "bbox/AP": 0.0}, again, {"iteration": 40, **final})
        with open(metrics, "a") as file:
            file.write('{"iteration": 59, "total_lo')
        layers = {"backbone.bottom_up.res2.0.conv1": 8, "backbone.bottom_up.res2.0.conv2": 300}
        model = {f"{name}.weight": torch.randn(filters, 8, 3, 3) for name, filters in layers.items()}
        torch.save({"model": model}, folder / "model_final.pth")
        if arm == "repr":
            lines = [dict(event="drop", iteration=9, cycle=0), dict(event="restore", iteration=19, cycle=0)]
            dropped = {name: [0, seed, 5] for name in layers}
            write_lines(folder / "repr_events.jsonl", *(line | {"dropped": dropped} for line in lines))
            overlap = {name: rng.random(number).tolist() for name, number in layers.items()}
            write_lines(folder / "repr_overlaps.jsonl", *(line | {"overlap": overlap} for line in lines))
        return folder

    return make


def compare_folders(tmp_path, baseline, repr_, *more):
    folders = ["--baseline-runs", *map(str, baseline), "--repr-runs", *map(str, repr_)]
    main([*folders, "--output", str(tmp_path / "out"), "--eval-images", "0", *more])


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
