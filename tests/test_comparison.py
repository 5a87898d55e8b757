"""The comparison's arithmetic: statistics against closed forms, AP of resampled images against pycocotools on a really
resampled data set, times and files of runs against made-up ones."""

import contextlib
import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import coco_of
from finished_runs import write_metrics
from pycocotools.cocoeval import COCOeval

from repr_det.studies.comparison.matches import METRICS, average_precision, bootstrap_multiplicities, match
from repr_det.studies.comparison.records import read_metrics, read_wall_clock
from repr_det.studies.comparison.runs import Run, is_finished
from repr_det.studies.comparison.statistics import paired_difference, percentile_interval, summarize, verdict_sentence
from repr_det.studies.comparison.timing import phase_seconds, sub_network_phases

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
        ([40, 41, 42], [40, 41.5, 41.6], "not distinguishable"),
        ([40, 41, 42], [40, 41, 42], "no verdict"),  # equal differences: an interval without width
        ([30, 31, 32], [30.1, 31.1, 32.1], "no verdict"),  # equal but for rounding
        ([40, 41], [41, 42.5], "no verdict"),
        ([40, 41, 42, math.nan], [41.0, 42.1, 42.9, 43], "no verdict"),
        ([40], [45], "no verdict"),
        ([math.nan, 40], [40, 45], "no verdict"),
        ([math.nan], [math.nan], "no verdict"),
    ],
)
def test_verdict(baseline, repr_, verdict):
    found = paired_difference(baseline, repr_)
    assert found.verdict == verdict
    assert found.direction == {"better": "higher", "worse": "lower"}.get(verdict, verdict)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ([1.0, 0.5, 0.9], "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: better"),
        ([-1.0, -0.5, -0.9], "RePr -0.8 AP, 95 % CI -1.5 .. -0.1, 3 seeds: worse"),
        ([1.0, -0.5], "RePr +0.2 AP, 95 % CI -9.3 .. +9.8, 2 seeds: no verdict (fewer than 3 pairs of runs)"),
        ([0.5, 0.5, 0.5], "RePr +0.5 AP, 3 seeds: no verdict (all differences are equal)"),
        (
            [1.0, 0.5, 0.9, math.nan],
            "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: no verdict (1 of 4 pairs of runs lacks the value)",
        ),
        ([0.8], "RePr +0.8 AP, 1 seed: no interval over seeds from one pair of runs, so no verdict"),
        ([math.nan], "AP: n/a (no pair of runs has it)"),
    ],
)
def test_verdict_in_words(values, sentence):
    assert verdict_sentence("AP", paired_difference([0.0] * len(values), values)) == sentence


def test_summary_leaves_out_what_is_not_there():
    found = summarize([1.0, math.nan, 4.0])
    assert (found.mean, found.sd, found.n) == (2.5, pytest.approx(math.sqrt(4.5)), 2)
    assert summarize([1.0, 7.0, 4.0], [0.0, math.nan, 1.0]).mean == 2.5  # the pairs of the difference
    assert math.isnan(summarize([3.0]).sd)
    assert math.isnan(summarize([math.nan]).mean)


def test_percentile_interval_of_known_samples():
    assert percentile_interval(np.append(np.arange(1001.0), np.nan)) == pytest.approx((25.0, 975.0))
    assert all(math.isnan(v) for v in percentile_interval(np.array([np.nan])))


# ---- AP over resampled images ----


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
        truth = coco_of(dataset)
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
    found = average_precision(match(coco_of(dataset), detections), np.ones((1, 24)))
    stats, classes = _pycocotools(dataset, detections)
    _agree([found.metrics[metric][0] for metric in METRICS], stats)
    _agree(found.categories[0], classes)
    assert 0.1 < stats[0] < 0.9


@pytest.mark.parametrize("number", range(6))
def test_a_resampled_list_is_pycocotools_on_a_data_set_with_copied_images(noisy, number):
    dataset, detections = noisy
    matches = match(coco_of(dataset), detections)
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
    found = average_precision(match(coco_of(dataset), detections), np.ones((1, 1)))
    assert found.metrics["AP"][0] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert found.metrics["APm"][0] == pytest.approx(found.metrics["AP"][0])
    assert math.isnan(found.metrics["APs"][0])  # no small object


def test_no_detections_and_a_list_without_objects(noisy):
    dataset, _ = noisy
    lists = np.zeros((2, 24))
    lists[0] = 1
    lists[1, -1] = 24  # an image without objects
    found = average_precision(match(coco_of(dataset), []), lists).metrics["AP"]
    assert found[0] == 0 and math.isnan(found[1])


def test_a_subset_of_images_ignores_the_rest(noisy):
    dataset, detections = noisy
    ids = [image["id"] for image in dataset["images"][:9]]
    found = average_precision(match(coco_of(dataset), detections, ids), np.ones((1, 9)), areas=("all",))
    smaller = dict(
        dataset,
        images=dataset["images"][:9],
        annotations=[a for a in dataset["annotations"] if a["image_id"] in ids],
    )
    stats, _ = _pycocotools(smaller, [d for d in detections if d["image_id"] in ids])
    _agree([found.metrics[m][0] for m in ("AP", "AP50", "AP75")], stats[:3])


def test_a_thousand_resampled_lists_take_seconds(noisy):
    dataset, detections = noisy
    matches = match(coco_of(dataset), detections)
    start = time.perf_counter()
    average_precision(matches, bootstrap_multiplicities(24, 1000))
    assert time.perf_counter() - start < 5


# ---- what runs leave behind ----


def test_metrics_of_a_resumed_run_count_once_and_a_torn_line_not_at_all(tmp_path):
    write_metrics(tmp_path, dict(iteration=19, total_loss=3.0), dict(iteration=39, total_loss=2.0))
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
    write_metrics(tmp_path, *rows)
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
