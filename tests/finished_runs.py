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
# KEY VALUE pairs of a comparison that takes the made-up runs for its own: those of SMALL but for its seed.
_SEED = SMALL.index("SEED")
_OWN = "SOLVER.MAX_ITER 40 TEST.EVAL_PERIOD 20 DATASETS.TRAIN ('odd_train',) DATASETS.TEST ('odd_val',)"
OPTS = [*SMALL[:_SEED], *SMALL[_SEED + 2 :], *_OWN.split()]


def write_metrics(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def named_data(tmp_path_factory, tiny_data):
    """The tiny images with class names that HTML and file formats trip over, registered as odd_train and odd_val."""
    root = tmp_path_factory.mktemp("odd")
    content = json.loads((tiny_data / "tiny.json").read_text())
    content["categories"] = [dict(id=1, name="<b>bläu & “x”</b>"), dict(id=2, name="绿色/$g$")]
    path = root / "odd.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    for name in ("odd_train", "odd_val"):
        register_coco_format(name, str(path), str(tiny_data / "images"))
    return path, tiny_data / "images"


@pytest.fixture
def finished(named_data, tiny_cfg, tmp_path):
    """``finished(arm, seed, KEY, VALUE, ...)`` -> the folder of a made-up finished run of 40 iterations."""
    truth = json.loads(named_data[0].read_text(encoding="utf-8"))

    def make(arm, seed, *opts, ap=None, folder=None):
        folder = folder or tmp_path / f"{arm}_{seed}"
        folder.mkdir()
        own = ["SOLVER.MAX_ITER", 40, "SEED", seed, "REPR.ENABLED", arm == "repr", "TEST.EVAL_PERIOD", 20]
        names = ["DATASETS.TRAIN", "('odd_train',)", "DATASETS.TEST", "('odd_val',)", "OUTPUT_DIR", str(folder)]
        cfg = tiny_cfg(*own, *names, *opts, config="repr_r50_fpn.yaml")
        (folder / "config.yaml").write_text(cfg.dump())
        rng = np.random.default_rng(abs(seed) + 100 * (arm == "repr"))
        detections = [dict(one, score=float(rng.uniform(0.4, 1))) for one in truth["annotations"]]
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        final = {f"bbox/{metric}": float(rng.uniform(20, 60)) for metric in METRICS}
        final |= {f"bbox/AP-{category['name']}": float(rng.uniform(20, 60)) for category in truth["categories"]}
        final["bbox/APl"] = math.nan  # images of 96 px hold no large object
        if ap is not None:
            final["bbox/AP"] = ap
        logged = [dict(iteration=i, total_loss=loss + seed / 10, time=0.5) for i, loss in ((19, 2.0), (39, 1.0))]
        on_the_way = {"iteration": 19, "bbox/AP": final["bbox/AP"] + 1}
        write_metrics(folder, *logged, on_the_way, {"iteration": 40, **final})
        layers = {"backbone.bottom_up.res2.0.conv1": 8, "backbone.bottom_up.res2.0.conv2": 300}
        model = {f"{name}.weight": torch.randn(filters, 8, 3, 3) for name, filters in layers.items()}
        torch.save({"model": model}, folder / "model_final.pth")
        for event, iteration in (("drop", 9), ("restore", 19)) if arm == "repr" else ():
            line = dict(iteration=iteration, event=event, cycle=0)
            content = {
                "repr_events.jsonl": dict(dropped={name: [0, seed, 5] for name in layers}, seconds=0.25),
                "repr_overlaps.jsonl": dict(overlap={name: rng.random(n).tolist() for name, n in layers.items()}),
            }
            for name, own in content.items():
                with (folder / name).open("a") as file:
                    file.write(json.dumps(line | own) + "\n")
        return folder

    return make


def compare_folders(tmp_path, baseline, repr_, *more):
    folders = ["--baseline-runs", *map(str, baseline), "--repr-runs", *map(str, repr_)]
    main([*folders, "--output", str(tmp_path / "out"), "--eval-images", "0", *more])


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
