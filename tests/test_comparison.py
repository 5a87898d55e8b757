"""The comparison's arithmetic: statistics against closed forms, AP of resampled images against pycocotools on a really
resampled data set, times and files of runs against made-up ones."""

import contextlib
import dataclasses
import io
import math
import time

import numpy as np
import pytest
from conftest import coco_of
from finished_runs import write_metrics
from pycocotools.cocoeval import COCOeval

from repr_det.studies.comparison.matches import METRICS, average_precision, bootstrap_pairs, match
from repr_det.studies.comparison.records import read_metrics, read_wall_clock
from repr_det.studies.comparison.runs import Run, is_finished
from repr_det.studies.comparison.statistics import (
    detectable_difference,
    interval,
    number,
    paired_difference,
    percentile_interval,
    power_sentence,
    seeds_needed,
    summarize,
    verdict_sentence,
)
from repr_det.studies.comparison.table import Reading, phase_seconds, sub_network_phases

NAN = math.nan

# ---- statistics ----


def test_interval_over_seeds_is_the_t_interval_worked_by_hand():
    # Differences 0.5, 1.0, 0.3: mean 0.6, sum of squares 0.26, sd sqrt(0.13); t(0.975, 2) = 4.30265 from a table.
    found = paired_difference([40.0, 41.0, 42.0], [40.5, 42.0, 42.3])
    half = 4.30265273 * math.sqrt(0.13 / 3)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.6), pytest.approx(math.sqrt(0.13)))
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "direction", "sentence"),
    [
        ([1.0, 0.5, 0.9], "higher", "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: better"),
        ([-1.0, -0.5, -0.9], "lower", "RePr -0.8 AP, 95 % CI -1.5 .. -0.1, 3 seeds: worse"),
        ([0.0, 0.5, -0.4], "not distinguishable", "RePr +0.0 AP, 95 % CI -1.1 .. +1.2, 3 seeds: not distinguishable"),
        (
            [1.0, -0.5],
            "no verdict",
            "RePr +0.2 AP, 95 % CI -9.3 .. +9.8, 2 seeds: no verdict (fewer than 3 pairs of runs)",
        ),
        ([0.5, 0.5, 0.5], "no verdict", "RePr +0.5 AP, 3 seeds: no verdict (all differences are equal)"),
        (
            [1.0, 0.5, 0.9, NAN],
            "no verdict",
            "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: no verdict (1 of 4 pairs of runs lacks the value)",
        ),
        ([0.8], "no verdict", "RePr +0.8 AP, 1 seed: no interval over seeds from one pair of runs, so no verdict"),
        ([NAN, NAN], "no verdict", "AP: n/a (no pair of runs has it)"),
    ],
)
def test_verdict_in_words(values, direction, sentence):
    found = paired_difference([0.0] * len(values), values)
    assert verdict_sentence("AP", found) == sentence
    assert found.direction == direction
    assert (
        paired_difference([30.0] * len(values), [30 + v for v in values]).verdict == found.verdict
    )  # but for rounding


def test_summary_leaves_out_what_is_not_there():
    found = summarize([1.0, NAN, 4.0])
    assert (found.mean, found.sd, found.n) == (2.5, pytest.approx(math.sqrt(4.5)), 2)
    assert summarize([1.0, 7.0, 4.0], [0.0, NAN, 1.0]).mean == 2.5  # the pairs of the difference
    assert math.isnan(summarize([3.0]).sd) and math.isnan(summarize([NAN]).mean)


# Pairs for a power of 0.8 of a two-sided paired t test at 5 %, by the size in standard deviations: tables of G*Power.
@pytest.mark.parametrize(("size", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1e9, 3), (0.001, 10_001)])
def test_the_seeds_that_a_difference_of_1_needs(size, pairs):
    observed = dataclasses.replace(paired_difference([0.0, 0.0, 0.0], [1.0, 0.5, 0.9]), sd=1 / size)
    assert seeds_needed(observed) == pairs
    assert f"needs {pairs if pairs < 10_001 else 'more than 10000'} seeds" in power_sentence("AP", observed)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_difference_that_seeds_could_have_shown_is_found_in_four_of_five_simulated_studies(n):
    values = np.random.default_rng(n).normal(0, 2, n)
    size = detectable_difference(paired_difference(np.zeros(n), values))
    studies = np.random.default_rng(1).normal(size, values.std(ddof=1), (20_000, n))
    t = {3: 4.30265, 5: 2.77645, 8: 2.36462}[n]  # t(0.975, n - 1) from a table
    better = studies.mean(axis=1) > t * studies.std(axis=1, ddof=1) / math.sqrt(n)
    assert better.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.5, 0.5, 0.5], [NAN, NAN, NAN]])
def test_without_a_spread_nothing_is_said_of_seeds(values):
    found = paired_difference([0.0] * len(values), values)
    assert math.isnan(detectable_difference(found)) and seeds_needed(found) is None and not power_sentence("AP", found)


def test_one_form_of_numbers():
    assert [number(41.26), number(0.84, sign=True), number(1.2346, 3), number(NAN), number(None)] == [
        "41.3",
        "+0.8",
        "1.235",
        "n/a",
        "n/a",
    ]
    assert (interval(-0.31, 1.9), interval(NAN, NAN), interval(None, None)) == ("-0.3 .. +1.9", "n/a", "n/a")


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
            own = dict(image_id=image["id"], category_id=category, bbox=[x, y, w, h])
            crowd = int(rng.random() < 0.1)
            annotations.append(dict(own, id=len(annotations) + 1, area=w * h, iscrowd=crowd))
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 0.1, 4)
                moved = [x + shift[0] * w, y + shift[1] * h, w * math.exp(shift[2]), h * math.exp(shift[3])]
                guess = category if rng.random() < 0.85 else 1
                detections.append(dict(own, category_id=guess, bbox=moved, score=float(rng.integers(1, 1000))))
    for image in images:
        detections.append(dict(image_id=image["id"], category_id=2, bbox=[5, 5, 30, 30], score=float(rng.random())))
    categories = [dict(id=1, name="a"), dict(id=2, name="b"), dict(id=7, name="c"), dict(id=9, name="never there")]
    return dict(images=images, annotations=annotations, categories=categories), detections


def _pycocotools(dataset, detections):
    """Metric or "AP-" and category -> AP in percent, by stock pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_of(dataset)
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = dict(zip(METRICS, evaluation.stats[:6], strict=True))
    for k, category in enumerate(dataset["categories"]):
        found[f"AP-{category['name']}"] = evaluation.eval["precision"][:, :, k, 0, 2].mean()
    return {name: NAN if value < 0 else 100 * value for name, value in found.items()}


def _agree(found, k, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name][k] == pytest.approx(value, abs=1e-7, nan_ok=True), name


def _copied(dataset, detections, times):
    """Images, objects and detections as often as ``times`` says, under new ids."""
    images, annotations, found = [], [], []
    for image, count in zip(sorted(dataset["images"], key=lambda one: one["id"]), times, strict=True):
        for _ in range(count):
            new = len(images) + 1
            images.append(dict(image, id=new))
            for one in dataset["annotations"]:
                if one["image_id"] == image["id"]:
                    annotations.append(dict(one, id=len(annotations) + 1, image_id=new))
            found += [dict(d, image_id=new) for d in detections if d["image_id"] == image["id"]]
    return dict(dataset, images=images, annotations=annotations), found


def test_ap_of_any_list_of_images_is_pycocotools_on_a_data_set_with_copied_images(noisy):
    dataset, detections = noisy
    lists = np.random.default_rng(11).multinomial(24, np.full(24, 1 / 24), size=5)
    lists = np.concatenate([np.ones((1, 24), int), lists])
    found = average_precision(match(coco_of(dataset), detections), lists)
    assert 10 < found["AP"][0] < 90
    for k, times in enumerate(lists):
        _agree(found, k, _pycocotools(*_copied(dataset, detections, times)))


def test_both_arms_are_evaluated_on_the_same_resampled_images(noisy):
    dataset, detections = noisy
    worse = [dict(d, score=d["score"] % 7) for d in detections]
    pairs = bootstrap_pairs(coco_of(dataset), [(detections, detections), (detections, worse)], 50)
    (first, twin), (again, other) = pairs
    for metric in METRICS:  # one model in both arms: no difference on any list
        np.testing.assert_array_equal(first[metric], twin[metric])
        np.testing.assert_array_equal(first[metric], again[metric])
    _agree(first, 0, _pycocotools(dataset, detections))
    assert len(first["AP"]) == 51 and first["AP"][1:].std() > 0.5
    # What the images share falls out of the difference.
    assert np.std(other["AP"] - again["AP"]) < 0.9 * math.hypot(other["AP"].std(), again["AP"].std())


def test_ap_of_three_detections_worked_by_hand():
    # Falling score: right, wrong, right, of 2 objects. Precision 1 up to recall 0.5 (51 of 101 thresholds), then 2/3.
    objects = [
        dict(id=i + 1, image_id=1, category_id=1, bbox=[100 * i, 0, 50, 50], area=2500, iscrowd=0) for i in (0, 1)
    ]
    dataset = dict(images=[dict(id=1)], annotations=objects, categories=[dict(id=1, name="a")])
    boxes = ([0, 0, 50, 50], [0, 120, 50, 50], [100, 0, 50, 50])
    detections = [dict(image_id=1, category_id=1, bbox=b, score=0.9 - 0.1 * i) for i, b in enumerate(boxes)]
    found = average_precision(match(coco_of(dataset), detections), np.ones((1, 1)))
    assert found["AP"][0] == found["APm"][0] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert math.isnan(found["APs"][0])  # no small object


def test_no_detections_and_a_list_without_objects(noisy):
    lists = np.zeros((2, 24))
    lists[0] = 1
    lists[1, -1] = 24  # an image without objects
    found = average_precision(match(coco_of(noisy[0]), []), lists)["AP"]
    assert found[0] == 0 and math.isnan(found[1])


def test_a_subset_of_images_ignores_the_rest(noisy):
    dataset, detections = noisy
    ids = [image["id"] for image in dataset["images"][:9]]
    found = average_precision(match(coco_of(dataset), detections, ids), np.ones((1, 9)))
    _agree(found, 0, _pycocotools(*_copied(dataset, detections, [1] * 9 + [0] * 15)))


def test_a_thousand_resampled_lists_take_seconds(noisy):
    start = time.perf_counter()
    bootstrap_pairs(coco_of(noisy[0]), [(noisy[1], noisy[1])], 1000)
    assert time.perf_counter() - start < 10


# ---- what runs leave behind ----


def test_metrics_of_a_resumed_run_count_once_and_a_torn_line_not_at_all(tmp_path):
    write_metrics(tmp_path, dict(iteration=19, total_loss=3.0), dict(iteration=39, total_loss=2.0))
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 59, "total_lo')
        file.write('\n{"iteration": 39, "total_loss": 2.5}\n')
    assert {i: row["total_loss"] for i, row in read_metrics(tmp_path).items()} == {19: 3.0, 39: 2.5}


@pytest.mark.parametrize(
    ("row", "finished"),
    [
        (None, False),
        ({"iteration": 99, "total_loss": 1.0}, False),
        ({"iteration": 49, "bbox/AP": 20.0}, False),  # an evaluation on the way
        ({"iteration": 100, "bbox/AP": 20.0}, True),
        ({"iteration": 101, "bbox/AP": 20.0}, True),  # resumed after the last step
        ({"iteration": 100, "bbox/AP": NAN}, True),
    ],
)
def test_finished_means_evaluated_after_the_last_iteration(tmp_path, row, finished):
    write_metrics(tmp_path, *([row] if row else []))
    assert is_finished(Run("repr", 1, tmp_path, 100)) == finished


def test_wall_clock_leaves_out_the_night_between_two_sessions(tmp_path):
    (tmp_path / "log.txt").write_text(
        "[12/31 23:59:00] detectron2 INFO: Rank of current process: 0. World size: 1\n"
        "[12/31 23:59:30] x INFO: Start inference on 5 batches\n"  # cut short after 40 s, in the new year
        "[01/01 00:00:10] x INFO: killed\n"
        "[01/02 09:00:00] detectron2 INFO: Rank of current process: 0. World size: 1\n"
        "[01/02 09:00:10] x INFO: Start inference on 5 batches\n"
        "[01/02 09:00:25] x INFO: copypaste: AP,AP50\n"
        "no stamp\n"
        "[01/02 09:00:30] x INFO: end\n"
    )
    assert read_wall_clock(tmp_path) == (70 + 30, 40 + 15)
    assert read_wall_clock(tmp_path / "nowhere") == (0, 0)


def test_time_by_phase(tmp_path):
    # Rows of 10 iterations; sub-network in 15-24 and 35-39, so 5 and 5, then 5 iterations of the third and fourth row.
    moments = (("drop", 14), ("restore", 24), ("drop", 34), ("restore", 39))
    events = [dict(event=event, iteration=i, seconds=1.5, slim="a field of 0.2.0") for event, i in moments]
    phases = sub_network_phases(events, 60)
    assert phases == [(15, 25), (35, 40)]
    assert sub_network_phases(events[:3], 60) == [(15, 25), (35, 60)]
    rows = {i: dict(time=t) for i, t in ((9, 1.0), (19, 2.0), (29, 3.0), (39, 4.0), (49, 5.0), (59, 6.0))}
    found = phase_seconds(Reading(Run("repr", 1, tmp_path, 60), rows, events, None), phases)
    full, sub = 10 * 1 + 5 * 2 + 5 * 3 + 5 * 4, 5 * 2 + 5 * 3 + 5 * 4
    assert found == dict(full=full, sub=sub, after=10 * 5 + 10 * 6, transitions=6, evaluation=0, rest=0)
