"""The comparison: statistics against closed forms, AP of resampled images against pycocotools on a really resampled
data set, refusal of folders that do not belong together, the runner with a fake command, the report as parsed HTML."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from repr_det.comparison.command import main
from repr_det.comparison.evaluation import evenly_spaced
from repr_det.comparison.gallery import correct_detections
from repr_det.comparison.matches import METRICS, average_precision, bootstrap_multiplicities, match
from repr_det.comparison.pairing import first_difference
from repr_det.comparison.plan import plan_runs
from repr_det.comparison.progress import Progress
from repr_det.comparison.records import read_metrics, read_wall_clock
from repr_det.comparison.runner import RunFailed, _environment, run_all
from repr_det.comparison.runs import Run, final_row, is_finished
from repr_det.comparison.statistics import paired_difference, percentile_interval, summarize, verdict_sentence
from repr_det.comparison.timing import phase_seconds, sub_network_phases
from repr_det.datasets import register_coco_format
from repr_det.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# ---- statistics ----


def test_interval_over_seeds_is_the_t_interval_worked_by_hand():
    # Differences 0.5, 1.0, 0.3: mean 0.6, sum of squares 0.26, sd sqrt(0.13); t(0.975, 2) = 4.30265 from a table.
    found = paired_difference([40.0, 41.0, 42.0], [40.5, 42.0, 42.3])
    half = 4.30265273 * math.sqrt(0.13 / 3)
    assert found.n == 3
    assert found.mean == pytest.approx(0.6)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
    assert found.verdict == "not distinguishable"


@pytest.mark.parametrize(
    "baseline, repr_, verdict",
    [
        ([40, 41, 42], [41.0, 42.1, 42.9], "better"),
        ([40, 41, 42], [39.0, 39.9, 41.1], "worse"),
        ([40, 41, 42], [40, 41, 42], "not distinguishable"),
        ([40, 41], [41, 42], "better"),  # equal differences: an interval of width 0
        ([40], [45], "no verdict"),
        ([math.nan, 40], [40, 45], "no verdict"),
        ([math.nan], [math.nan], "no verdict"),
    ],
)
def test_verdict(baseline, repr_, verdict):
    assert paired_difference(baseline, repr_).verdict == verdict


@pytest.mark.parametrize(
    "values, sentence",
    [
        ([1.0, 0.5, 0.9], "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: better"),
        ([-1.0, -0.5, -0.9], "RePr -0.8 AP, 95 % CI -1.5 .. -0.1, 3 seeds: worse"),
        ([1.0, -0.5], "RePr +0.2 AP, 95 % CI -9.3 .. +9.8, 2 seeds: not distinguishable"),
        ([0.8], "RePr +0.8 AP, 1 seed: no interval over seeds from one pair of runs, so no verdict"),
        ([math.nan], "AP: n/a (no pair of runs has it)"),
    ],
)
def test_verdict_in_words(values, sentence):
    assert verdict_sentence("AP", paired_difference([0.0] * len(values), values)) == sentence


def test_summary_leaves_out_what_is_not_there():
    found = summarize([1.0, math.nan, 4.0])
    assert (found.mean, found.sd, found.n) == (2.5, pytest.approx(math.sqrt(4.5)), 2)
    assert math.isnan(summarize([3.0]).sd)
    assert math.isnan(summarize([math.nan]).mean)


def test_percentile_interval_of_known_samples():
    assert percentile_interval(np.append(np.arange(1001.0), np.nan)) == pytest.approx((25.0, 975.0))
    assert all(math.isnan(v) for v in percentile_interval(np.array([np.nan])))


# ---- AP over resampled images ----


def _coco(dataset):
    truth = COCO()
    truth.dataset = dataset
    truth.createIndex()
    return truth


@pytest.fixture(scope="module")
def noisy():
    """24 images, 3 categories (one rare), crowds, all sizes, and detections with ties in their scores."""
    rng = np.random.default_rng(5)
    images = [dict(id=10 * i + 3, width=400, height=400) for i in range(24)]
    annotations, detections = [], []
    for image in images[:-2]:  # two images without objects
        for _ in range(rng.integers(1, 6)):
            category = int(rng.choice([1, 2, 7], p=[0.6, 0.35, 0.05]))
            w, h = (float(v) for v in rng.choice([12, 40, 150], 2))
            x, y = (float(v) for v in rng.uniform(0, 240, 2))
            crowd = int(rng.random() < 0.1)
            box = [x, y, w, h]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image["id"],
                    category_id=category,
                    bbox=box,
                    area=w * h,
                    iscrowd=crowd,
                )
            )
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 0.1, 4)
                moved = [x + shift[0] * w, y + shift[1] * h, w * math.exp(shift[2]), h * math.exp(shift[3])]
                guess = category if rng.random() < 0.85 else 1
                detections.append(
                    dict(image_id=image["id"], category_id=guess, bbox=moved, score=float(rng.integers(1, 1000)))
                )
    for image in images:
        detections.append(dict(image_id=image["id"], category_id=2, bbox=[5, 5, 30, 30], score=float(rng.random())))
    categories = [dict(id=1, name="a"), dict(id=2, name="b"), dict(id=7, name="c"), dict(id=9, name="never there")]
    return dict(images=images, annotations=annotations, categories=categories), detections


def _pycocotools(dataset, detections):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(dataset)
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    classes = [precision[:, :, k].mean() for k in range(precision.shape[2])]
    return evaluation.stats[:6], [math.nan if c < 0 else c for c in classes]


def _agree(found, expected):
    expected = np.where(np.asarray(expected, dtype=float) < 0, math.nan, np.asarray(expected, dtype=float))
    np.testing.assert_allclose(np.asarray(found) / 100, expected, rtol=0, atol=1e-9)


def test_every_image_once_is_pycocotools(noisy):
    dataset, detections = noisy
    found = average_precision(match(_coco(dataset), detections), np.ones((1, 24)))
    stats, classes = _pycocotools(dataset, detections)
    _agree([found.metrics[metric][0] for metric in METRICS], stats)
    _agree(found.categories[0], classes)
    assert 0.1 < stats[0] < 0.9


@pytest.mark.parametrize("number", range(6))
def test_a_resampled_list_is_pycocotools_on_a_data_set_with_copied_images(noisy, number):
    dataset, detections = noisy
    matches = match(_coco(dataset), detections)
    lists = bootstrap_multiplicities(24, 6, seed=11)
    assert lists.sum(axis=1).tolist() == [24] * 6
    # Independent: copy images, objects and detections as often as the list says, under new ids.
    copied, copied_detections = dict(dataset, images=[], annotations=[]), []
    for image_id, times in zip(matches.image_ids, lists[number], strict=True):
        for _ in range(times):
            new = len(copied["images"]) + 1
            copied["images"].append(dict(id=new, width=400, height=400))
            for one in dataset["annotations"]:
                if one["image_id"] == image_id:
                    copied["annotations"].append(dict(one, id=len(copied["annotations"]) + 1, image_id=new))
            copied_detections += [dict(d, image_id=new) for d in detections if d["image_id"] == image_id]
    stats, classes = _pycocotools(copied, copied_detections)
    found = average_precision(matches, lists)
    _agree([found.metrics[metric][number] for metric in METRICS], stats)
    _agree(found.categories[number], classes)


def test_ap_of_three_detections_worked_by_hand():
    # Falling score: right, wrong, right, of 2 objects. Precision 1 up to recall 0.5 (51 of 101 thresholds), then 2/3.
    dataset = dict(
        images=[dict(id=1, width=200, height=200)],
        annotations=[
            dict(id=i + 1, image_id=1, category_id=1, bbox=[100 * i, 0, 50, 50], area=2500, iscrowd=0) for i in (0, 1)
        ],
        categories=[dict(id=1, name="a")],
    )
    boxes = ([0, 0, 50, 50], [0, 120, 50, 50], [100, 0, 50, 50])
    detections = [dict(image_id=1, category_id=1, bbox=b, score=0.9 - 0.1 * i) for i, b in enumerate(boxes)]
    found = average_precision(match(_coco(dataset), detections), np.ones((1, 1)))
    assert found.metrics["AP"][0] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert found.metrics["APm"][0] == pytest.approx(found.metrics["AP"][0])
    assert math.isnan(found.metrics["APs"][0])  # no small object


def test_no_detections_and_a_list_without_objects(noisy):
    dataset, _ = noisy
    lists = np.zeros((2, 24))
    lists[0] = 1
    lists[1, -1] = 24  # an image without objects
    found = average_precision(match(_coco(dataset), []), lists).metrics["AP"]
    assert found[0] == 0 and math.isnan(found[1])


def test_a_subset_of_images_ignores_the_rest(noisy):
    dataset, detections = noisy
    ids = [image["id"] for image in dataset["images"][:9]]
    found = average_precision(match(_coco(dataset), detections, ids), np.ones((1, 9)), areas=("all",))
    smaller = dict(
        dataset,
        images=dataset["images"][:9],
        annotations=[a for a in dataset["annotations"] if a["image_id"] in ids],
    )
    stats, _ = _pycocotools(smaller, [d for d in detections if d["image_id"] in ids])
    _agree([found.metrics[m][0] for m in ("AP", "AP50", "AP75")], stats[:3])


def test_a_thousand_resampled_lists_take_seconds(noisy):
    dataset, detections = noisy
    matches = match(_coco(dataset), detections)
    start = time.perf_counter()
    average_precision(matches, bootstrap_multiplicities(24, 1000))
    assert time.perf_counter() - start < 5


# ---- what runs leave behind ----


def _metrics(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metrics_of_a_resumed_run_count_once_and_a_torn_line_not_at_all(tmp_path):
    _metrics(tmp_path, dict(iteration=19, total_loss=3.0), dict(iteration=39, total_loss=2.0))
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 59, "total_lo')
        file.write('\n{"iteration": 39, "total_loss": 2.5}\n')
    assert {i: row["total_loss"] for i, row in read_metrics(tmp_path).items()} == {19: 3.0, 39: 2.5}


@pytest.mark.parametrize(
    "rows, finished",
    [
        ([], False),
        ([{"iteration": 99, "total_loss": 1.0}], False),
        ([{"iteration": 49, "bbox/AP": 20.0}], False),  # an evaluation on the way
        ([{"iteration": 100, "bbox/AP": 20.0}], True),
        ([{"iteration": 101, "bbox/AP": 20.0}], True),  # resumed after the last step
        ([{"iteration": 100, "bbox/AP": math.nan}], True),
    ],
)
def test_finished_means_evaluated_after_the_last_iteration(tmp_path, rows, finished):
    _metrics(tmp_path, *rows)
    assert is_finished(Run("repr", 1, tmp_path, 100)) == finished


def test_wall_clock_leaves_out_the_night_between_two_sessions(tmp_path):
    (tmp_path / "log.txt").write_text(
        "[01/01 10:00:00] detectron2 INFO: Rank of current process: 0. World size: 1\n"
        "[01/01 10:00:30] x INFO: Start inference on 5 batches\n"  # never ended
        "[01/01 10:01:00] x INFO: killed\n"
        "[01/02 09:00:00] detectron2 INFO: Rank of current process: 0. World size: 1\n"
        "[01/02 09:00:10] x INFO: Start inference on 5 batches\n"
        "[01/02 09:00:25] x INFO: copypaste: AP,AP50\n"
        "no stamp\n"
        "[01/02 09:00:30] x INFO: end\n"
    )
    found = read_wall_clock(tmp_path)
    assert (found.total, found.evaluation) == (60 + 30, 15)


def test_time_by_phase():
    # Rows of 10 iterations; sub-network in 15-24 and 35-39, so 5 and 5, then 5 iterations of the third and fourth row.
    events = [
        dict(event="drop", iteration=14),
        dict(event="restore", iteration=24),
        dict(event="drop", iteration=34),
        dict(event="restore", iteration=39),
    ]
    phases = sub_network_phases(events, 60)
    assert phases == [(15, 25), (35, 40)]
    rows = {i: dict(time=t) for i, t in ((9, 1.0), (19, 2.0), (29, 3.0), (39, 4.0), (49, 5.0), (59, 6.0))}
    found = phase_seconds(rows, phases, 7.0, None)
    assert found["sub"] == 5 * 2 + 5 * 3 + 5 * 4
    assert found["full"] == 10 * 1 + 5 * 2 + 5 * 3 + 5 * 4
    assert found["after"] == 10 * 5 + 10 * 6
    assert found["transitions"] == 7


# ---- which runs belong together ----


@pytest.fixture(scope="module")
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
        spread = 0.02 if arm == "repr" else 0.08
        detections = [
            dict(
                image_id=a["image_id"],
                category_id=a["category_id"],
                bbox=[v + float(rng.normal(0, spread)) * a["bbox"][2] for v in a["bbox"]],
                score=float(rng.uniform(0.4, 1)),
            )
            for a in truth["annotations"]
        ]
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        with contextlib.redirect_stdout(io.StringIO()):
            result = average_precision(match(_coco(truth), detections), np.ones((1, 12)))
        final = {f"bbox/{m}": float(v[0]) for m, v in result.metrics.items()}
        final |= {
            f"bbox/AP-{c['name']}": float(v) for c, v in zip(truth["categories"], result.categories[0], strict=True)
        }
        if ap is not None:
            final["bbox/AP"] = ap
        _metrics(
            folder,
            dict(iteration=19, total_loss=2.0 + seed / 10, time=0.5),
            {"iteration": 19, "bbox/AP": final["bbox/AP"] + 1},
            dict(iteration=39, total_loss=1.0 + seed / 10, time=0.5),
            {"iteration": 40, **final},
        )
        if arm == "repr":
            layers = {"backbone.bottom_up.res2.0.conv1": 8, "backbone.bottom_up.res2.0.conv2": 300}
            with (folder / "repr_events.jsonl").open("w") as events, (folder / "repr_overlaps.jsonl").open("w") as o:
                for event, iteration in (("drop", 9), ("restore", 19)):
                    dropped = {name: [0, seed, 5] for name in layers}
                    line = dict(iteration=iteration, event=event, cycle=0, dropped=dropped, seconds=0.25)
                    line |= dict(overlap_before=0.2, overlap_after=0.1, max_cosine={})
                    events.write(json.dumps(line) + "\n")
                    overlap = {name: rng.random(n).round(4).tolist() for name, n in layers.items()}
                    o.write(json.dumps(dict(iteration=iteration, event=event, cycle=0, overlap=overlap)) + "\n")
        return folder

    return make


def _compare(tmp_path, baseline, repr_, *more):
    folders = ["--baseline-runs", *map(str, baseline), "--repr-runs", *map(str, repr_)]
    main([*folders, "--output", str(tmp_path / "out"), "--train-images", "0", "--bootstrap", "50", *more])


@pytest.mark.parametrize(
    "key, here, there",
    [
        ("SOLVER.MAX_ITER", "40", "60"),
        ("DATASETS.TRAIN", "['odd_train']", "['odd_val']"),
        ("SOLVER.IMS_PER_BATCH", "2", "4"),
        ("INPUT.MIN_SIZE_TRAIN", "[64]", "[64, 80]"),
        ("MODEL.RESNETS.DEPTH", "18", "34"),
        ("SOLVER.BASE_LR", "0.005", "0.01"),
        ("TEST.EVAL_PERIOD", "20", "10"),
    ],
)
def test_runs_of_different_settings_are_refused_with_both_values(finished, tmp_path, key, here, there):
    value = "('odd_val',)" if key == "DATASETS.TRAIN" else "(64, 80)" if key == "INPUT.MIN_SIZE_TRAIN" else there
    base, other = finished("baseline", 1), finished("repr", 1, key, value)
    if key == "SOLVER.MAX_ITER":
        _metrics(other, {"iteration": 60, "bbox/AP": 1.0})
    with pytest.raises(UserError) as error:
        _compare(tmp_path, [base], [other])
    assert f"{base} and {other} cannot be compared: {key} is {here} in the first and {there} in the second" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_key_that_matters_most_is_named_first():
    a = {"MODEL.X": 1, "SOLVER.BASE_LR": 1, "SOLVER.MAX_ITER": 1, "DATASETS.TRAIN": "a", "SEED": 1, "REPR.X": 1}
    assert first_difference(a, {key: 2 for key in a}) == "SOLVER.MAX_ITER"
    assert first_difference(a, dict(a, **{"MODEL.X": 2, "SOLVER.BASE_LR": 2})) == "MODEL.X"
    assert first_difference(a, dict(a, SEED=2, **{"REPR.X": 2})) is None


def test_repr_runs_of_different_schemes_are_refused(finished, tmp_path):
    bases = [finished("baseline", 1), finished("baseline", 2)]
    others = [finished("repr", 1), finished("repr", 2, "REPR.DROP_RATIO", 0.25)]
    with pytest.raises(UserError, match=r"REPR.DROP_RATIO is 0.3 in the first and 0.25 in the second"):
        _compare(tmp_path, bases, others)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda b, r: (b / "metrics.json").unlink(),
            r"baseline_1 is not finished \(0 of SOLVER.MAX_ITER 40 iterations",
        ),
        (
            lambda b, r: _metrics(r, dict(iteration=19, total_loss=1.0)),
            r"repr_1 is not finished \(20 of SOLVER.MAX_ITER",
        ),
        (lambda b, r: (r / "config.yaml").unlink(), r"repr_1/config.yaml is missing"),
        (lambda b, r: (r / "config.yaml").write_text("a: ["), r"repr_1/config.yaml is not valid YAML"),
        (lambda b, r: (r / "config.yaml").write_text("just words"), r"repr_1/config.yaml holds str"),
        (lambda b, r: shutil.rmtree(r), r"repr_1 is not a folder"),
    ],
)
def test_what_is_no_finished_run_is_refused(finished, tmp_path, damage, message):
    base, other = finished("baseline", 1), finished("repr", 1)
    damage(base, other)
    with pytest.raises(UserError, match=message):
        _compare(tmp_path, [base], [other])
    assert not (tmp_path / "out").exists()


def test_seeds_and_arms_must_fit(finished, tmp_path):
    base, other, third = finished("baseline", 1), finished("repr", 1), finished("repr", 3)
    with pytest.raises(UserError, match=r"repr_3 has SEED 3, but the baseline runs have 1"):
        _compare(tmp_path, [base], [other, third])
    with pytest.raises(UserError, match=r"are both RePr seed 1"):
        _compare(tmp_path, [base], [other, other])
    with pytest.raises(UserError, match=r"repr_1 was trained with REPR.ENABLED True: it does not belong to --baseline"):
        _compare(tmp_path, [other], [other])
    random = finished("baseline", -1)
    with pytest.raises(UserError, match=r"trained with SEED -1"):
        _compare(tmp_path, [random], [other])


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give --config-file and --seeds"),
        (["--config-file", "x.yaml"], "give --config-file and --seeds"),
        (["--config-file", "x.yaml", "--seeds", "1"], "'x.yaml' is not a file"),
        (["--baseline-runs", "a", "--output", "o"], "go together"),
        (["--baseline-runs", "a", "--repr-runs", "b"], "--output is missing"),
        (["--report-only"], "--report-only needs --output"),
        (["--report-only", "--output", "nowhere"], "holds no comparison"),
        (["--jobs", "0", "--config-file", "x", "--seeds", "1"], "--jobs must be at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_comparison(words, message):
    with pytest.raises(UserError, match=message):
        main(words)


def test_plan(named_data, tmp_path):
    opts = [*SMALL, "DATASETS.TRAIN", "('odd_train',)", "DATASETS.TEST", "('odd_val',)", "SOLVER.MAX_ITER", "60"]
    opts[opts.index("SEED") : opts.index("SEED") + 2] = []
    config = str(ROOT / "configs" / "repr_r50_fpn.yaml")
    opts += ["SOLVER.STEPS", "()"]
    runs, _ = plan_runs(config, [4, 2], tmp_path, opts=opts, evaluations=10)
    assert [run.folder.name for run in runs] == ["baseline_seed4", "repr_seed4", "baseline_seed2", "repr_seed2"]
    assert all(run.opts[-6:] == ("TEST.EVAL_PERIOD", "6", "SEED", str(run.seed), *run.opts[-2:]) for run in runs)
    assert [("--baseline" in run.flags) for run in runs] == [True, False, True, False]
    resumed = runs[0].command(resume=True)
    assert resumed[: len(runs[0].flags) + 1] == [*runs[0].flags, "--resume"]  # before KEY VALUE
    for words, message in (
        (["SEED", "3"], "SEED on the command line"),
        (["OUTPUT_DIR", "x"], "OUTPUT_DIR on the command line"),
    ):
        with pytest.raises(UserError, match=message):
            plan_runs(config, [1], tmp_path, opts=[*opts, *words])
    with pytest.raises(UserError, match="must differ"):
        plan_runs(config, [1, 1], tmp_path, opts=opts)
    with pytest.raises(UserError, match=r"REPR\.ENABLED False"):
        plan_runs(config.replace("repr_r50", "baseline_r50"), [1], tmp_path, opts=opts)


def test_a_folder_of_another_comparison_is_not_continued(finished, named_data, tmp_path):
    folder = tmp_path / "mine" / "baseline_seed1"
    folder.parent.mkdir()
    finished("baseline", 1, "SOLVER.BASE_LR", 0.5, folder=folder)
    opts = [*SMALL, "DATASETS.TRAIN", "('odd_train',)", "DATASETS.TEST", "('odd_val',)", "SOLVER.MAX_ITER", "40"]
    opts[opts.index("SEED") : opts.index("SEED") + 2] = []
    with pytest.raises(UserError, match=r"baseline_seed1 holds a run with SOLVER.BASE_LR 0.5, but .* has 0.005"):
        plan_runs(
            str(ROOT / "configs" / "repr_r50_fpn.yaml"),
            [1],
            folder.parent,
            opts=[*opts, "SOLVER.STEPS", "(30,)", "TEST.EVAL_PERIOD", "20"],
            evaluations=10,
        )


# ---- the runner, with a fake training command ----

FAKE = """
import json, os, sys, time
folder, steps, pause, status = sys.argv[1], int(sys.argv[-3]), float(sys.argv[-2]), int(sys.argv[-1])
log = lambda **row: open(folder + "/metrics.json", "a").write(json.dumps(row) + chr(10))
open(folder + "/calls.txt", "a").write(" ".join(sys.argv[2:-3]) + "|" + os.environ["OMP_NUM_THREADS"] + chr(10))
done = sum(1 for _ in open(folder + "/metrics.json")) if "--resume" in sys.argv else 0
for step in range(done, steps):
    time.sleep(pause)
    print("step", step)
    log(iteration=step, total_loss=1.0, wall=time.time())
if status:
    print("Traceback: it broke", file=sys.stderr)
    sys.exit(status)
log(**{"iteration": steps, "bbox/AP": 33.0})
"""


@pytest.fixture
def fake(tmp_path):
    """``fake(seed, steps, pause, status)`` -> a Run whose command is a script that writes metrics.json."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def make(seed, steps=3, pause=0.02, status=0, arm="repr"):
        folder = tmp_path / f"{arm}{seed}"
        words = tuple(str(v) for v in (steps, pause, status))
        return Run(arm, seed, folder, steps, (sys.executable, str(script), str(folder)), words)

    return make


def _calls(run):
    return (run.folder / "calls.txt").read_text().splitlines()


def _progress(runs, jobs=1):
    stream = io.StringIO()
    return Progress(runs, jobs, stream, interval=0.2), stream


def test_runs_are_trained_once_and_then_skipped(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = [fake(1), fake(2), fake(3)]
    progress, stream = _progress(runs, 2)
    run_all(runs, jobs=2, progress=progress)
    assert all(map(is_finished, runs))
    assert final_row(runs[0].folder, 3)["bbox/AP"] == 33.0
    cores = len(os.sched_getaffinity(0))
    assert [_calls(run) for run in runs] == [[f"|{max(1, cores // 2)}"]] * 3
    assert "step 2" in (runs[0].folder / "stdout.txt").read_text()
    assert "3 of 3" in stream.getvalue() or "done in" in stream.getvalue()
    progress, stream = _progress(runs)
    run_all(runs, progress=progress)
    assert [len(_calls(run)) for run in runs] == [1, 1, 1]
    assert "finished already: RePr seed 1, RePr seed 2, RePr seed 3" in stream.getvalue()


@pytest.mark.parametrize(
    "visible, jobs, num_gpus, expected",
    [
        ("3,5", 2, 1, ["3", "5"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0", 2, 1, ["0", "0"]),  # too few to share out: as given
        ("4,6", 1, 1, ["4,6"]),
    ],
)
def test_every_run_gets_gpus_of_its_own(monkeypatch, visible, jobs, num_gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [_environment(slot, jobs, num_gpus)["CUDA_VISIBLE_DEVICES"] for slot in range(jobs)]
    assert found == expected


def test_an_unfinished_run_is_resumed(fake):
    run = fake(1, steps=5)
    _metrics(run.folder, *({"iteration": i, "total_loss": 1.0} for i in range(3)))
    run_all([run], progress=_progress([run])[0])
    assert _calls(run)[0].startswith("--resume|")
    assert list(read_metrics(run.folder)) == [0, 1, 2, 3, 4, 5]


def test_two_runs_really_go_on_at_once(fake):
    runs = [fake(n, steps=15, pause=0.1) for n in (1, 2)]
    run_all(runs, jobs=2, progress=_progress(runs)[0])
    first, second = ([row["wall"] for row in read_metrics(run.folder).values() if "wall" in row] for run in runs)
    assert min(second) < max(first) and min(first) < max(second)


def test_a_failure_shows_its_output_and_command_and_ends_the_rest(fake):
    good, bad = fake(1, steps=500, pause=0.1), fake(2, steps=2, status=3)
    with pytest.raises(RunFailed) as error:
        run_all([good, bad], jobs=2, progress=_progress([good, bad])[0])
    text = str(error.value)
    assert "RePr seed 2 ended with status 3" in text
    assert "| Traceback: it broke" in text and "| step 1" in text
    assert text.rstrip().endswith(f"{bad.folder} 2 0.02 3")
    assert not _alive(good)
    assert not is_finished(good)


def test_a_run_that_ends_without_an_evaluation_has_failed(fake):
    run = fake(1)
    silent = Run("repr", 1, run.folder, 99, run.flags, run.opts)  # needs 99 iterations, the script makes 3
    with pytest.raises(RunFailed, match="ended without an evaluation"):
        run_all([silent], progress=_progress([silent])[0])


def _alive(run):
    """Whether a process trains in the folder: the size of its output still changes."""
    before = (run.folder / "stdout.txt").stat().st_size
    time.sleep(0.4)
    return (run.folder / "stdout.txt").stat().st_size != before


# A parent process without Detectron2, which takes seconds to import and has no part in this.
PARENT = """
import sys, types
from pathlib import Path
sys.modules["repr_det.cli"] = types.SimpleNamespace(run_tool=lambda main: main())
from repr_det.comparison.runner import run_all, run_comparison_tool
from repr_det.comparison.runs import Run
flags = (sys.executable, sys.argv[1], sys.argv[2])
run_comparison_tool(lambda: run_all([Run("repr", 1, Path(sys.argv[2]), 40, flags, ("40", "0.1", "0"))]))
"""


def _start_parent(run):
    command = [sys.executable, "-c", PARENT, run.flags[1], str(run.folder)]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 40
    while not (run.folder / "metrics.json").exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return parent


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_comparison_leaves_no_child_and_continues(fake, number, status):
    run = fake(1, steps=40, pause=0.1)
    parent = _start_parent(run)
    if number == signal.SIGTERM:  # while it trains, nobody else may
        with pytest.raises(UserError, match="is being trained by another process"):
            run_all([run], progress=_progress([run])[0])
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=15)
    assert parent.returncode == status
    if number != signal.SIGKILL:
        assert "the same command continues" in errors
    time.sleep(0.3)
    assert not _alive(run)
    steps = len(read_metrics(run.folder))
    assert 0 < steps < 40
    short = Run("repr", 1, run.folder, steps + 2, run.flags, (str(steps + 2), "0.01", "0"))
    run_all([short], progress=_progress([short])[0])
    assert _calls(run)[-1].startswith("--resume|") and is_finished(short)


# ---- the report ----


VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Text, tags, ids and addresses of a page; refuses tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.ids, self.addresses, self.open = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_report_of_finished_folders(finished, tmp_path, capsys):
    bases = [finished("baseline", s) for s in (1, 2, 3)]
    others = [finished("repr", s) for s in (3, 1, 2)]
    _compare(tmp_path, bases, others, "--eval-images", "4")
    out = tmp_path / "out"
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["verdict"] in shown and "note:" not in shown
    row = results["metrics"]["AP"]
    expected = [json.loads((folder / "metrics.json").read_text().splitlines()[-1])["bbox/AP"] for folder in bases]
    assert row["baseline"]["values"] == pytest.approx(expected)
    assert row["baseline"]["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert results["training"]["lost"]["baseline"]["mean"] == pytest.approx(1.0)  # the best was 1 above the final
    assert results["pairs"][0]["repr"]["best_iteration"] == 20
    assert results["pairs"][1]["images"]["AP"]["difference"] == pytest.approx(row["difference"]["values"][1], abs=1e-9)
    assert results["time"]["repr"] == pytest.approx(
        dict(full=5.0, sub=5.0, after=10.0, transitions=0.5, evaluation=0, rest=0)
    )
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        table = {line["name"]: line for line in csv.DictReader(file)}
    assert set(table) == {*METRICS, "AP-<b>bläu & “x”</b>", "AP-绿色/$g$"}
    assert float(table["AP"]["difference"]) == pytest.approx(row["difference"]["mean"], abs=1e-4)
    assert table["APl"]["difference"] == "n/a"  # images of 96 px hold no large object

    source = (out / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "<b>bläu" not in source and "<b>bläu & “x”</b>" in page.text and "绿色/$g$" in page.text
    assert page.text.replace("\N{MINUS SIGN}", "-").count(results["verdict"].rpartition(": ")[0])
    for word in (*METRICS, "not distinguishable", "n/a", "95 % interval over images", "Settings", "SOLVER.MAX_ITER"):
        assert word in page.text, word
    for folder in (*bases, *others):
        assert os.path.relpath(folder, out) in page.text
    assert page.tags.count("svg") == 6 + 4 * 3  # six figures; four images in three panels
    assert "script" not in page.tags and len(page.ids) == len(set(page.ids))
    # Self-contained: every address is inside the page.
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert "@import" not in source and "url(http" not in source

    (out / "report.html").unlink()
    main(["--report-only", "--output", str(out), "--train-images", "0", "--bootstrap", "50", "--eval-images", "4"])
    assert Page((out / "report.html").read_text(encoding="utf-8")).tags == page.tags


def test_report_says_what_is_missing(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1, ap=math.nan)
    shutil.rmtree(base / "inference")
    for name in ("repr_events.jsonl", "repr_overlaps.jsonl"):
        (other / name).unlink()
    _compare(tmp_path, [base], [other])
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "AP: n/a (no pair of runs has it)" in page.text.replace(" :", ":")
    assert "No bootstrap over images: " in page.text
    assert "One seed says nothing" in page.text
    assert "Which filters were dropped" not in page.text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["AP"]["repr"]["mean"] is None


def test_detections_of_another_evaluation_are_noticed(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1, ap=12.0)
    _compare(tmp_path, [base], [other])
    (note,) = json.loads((tmp_path / "out" / "results.json").read_text())["notes"]
    assert "metrics.json says 12.00" in note and str(other) in note


def test_other_data_under_the_same_name_are_noticed(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1)
    path = other / "inference" / "coco_instances_results.json"
    path.write_text(json.dumps([dict(image_id=999, category_id=1, bbox=[0, 0, 5, 5], score=0.9)]))
    _compare(tmp_path, [base], [other])
    (note,) = json.loads((tmp_path / "out" / "results.json").read_text())["notes"]
    assert f"{other} has detections on images that odd_val lacks" in note


def test_runs_of_another_number_of_classes_still_get_their_table(finished, tmp_path):
    base, other = (finished(arm, 1, "MODEL.ROI_HEADS.NUM_CLASSES", 5) for arm in ("baseline", "repr"))
    _compare(tmp_path, [base], [other])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "NUM_CLASSES is 5, but odd_val has 2 classes" in found["notes"][0]
    assert found["metrics"]["AP"]["difference"]["n"] == 1 and found["bootstrap_samples"] == 0


def test_correct_detections_take_each_object_once():
    objects = [dict(bbox=[0, 0, 10, 10], category_id=1), dict(bbox=[50, 0, 10, 10], category_id=2)]
    detections = [
        dict(bbox=[0, 0, 10, 9], category_id=1, score=0.6),  # the object is taken by the next, of higher score
        dict(bbox=[0, 0, 10, 10], category_id=1, score=0.9),
        dict(bbox=[50, 0, 10, 10], category_id=1, score=0.8),  # wrong class
        dict(bbox=[50, 4, 10, 10], category_id=2, score=0.7),  # IoU 60 / 140
    ]
    assert correct_detections(objects, detections) == [False, True, False, False]
    assert correct_detections([], detections) == [False] * 4


def test_images_are_spread_evenly():
    assert evenly_spaced(list(range(11)), 3) == [0, 5, 10]
    assert evenly_spaced([1, 2], 6) == [1, 2]


# ---- the whole command, really training ----


def test_from_nothing_to_report(named_data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(
        "OMP_NUM_THREADS", raising=False
    )  # conftest.py's 2 for each of two runs at once would be too many
    opts = [*SMALL, "SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "()", "REPR.S1_ITERS", "2", "REPR.S2_ITERS", "1"]
    opts[opts.index("SEED") : opts.index("SEED") + 2] = []
    opts += [
        "REPR.NUM_CYCLES",
        "1",
        "REPR.LAYERS.INCLUDE",
        "['*.res2.*.conv*']",
        "DATASETS.TRAIN",
        "('odd_a',)",
        "DATASETS.TEST",
        "('odd_b',)",
    ]
    words = ["--config-file", str(ROOT / "configs" / "repr_r50_fpn.yaml"), "--seeds", "1", "--jobs", "2"]
    words += ["--output", str(tmp_path / "ütput"), "--train-images", "4", "--bootstrap", "20", "--eval-images", "2"]
    for name in ("odd_a", "odd_b"):
        words += ["--register", name, *map(str, named_data)]
    main([*words, *opts, "TEST.EVAL_PERIOD", "6"])
    out = tmp_path / "ütput"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert all(len(list(read_metrics(out / f"{arm}_seed1"))) for arm in ("baseline", "repr"))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "One seed says nothing" in page.text and "at the end" in results["verdict"] + page.text
    assert results["training"]["final_loss"]["repr"]["values"][0] > 0
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")}
    assert len(stamps) == 2
    capsys.readouterr()
    main([*words, *opts, "TEST.EVAL_PERIOD", "6"])  # again: nothing is trained
    assert "finished already: baseline seed 1, RePr seed 1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")} == stamps
