"""The comparison's arithmetic: statistics against closed forms and simulations, files of runs against made-up ones."""

import dataclasses
import math

import numpy as np
import pytest
from finished_runs import write_metrics

from repr_det.studies.comparison.records import Run, is_finished, read_metrics
from repr_det.studies.comparison.report import phases
from repr_det.studies.comparison.statistics import could_show, number, paired_difference, summarize, verdict_sentence

NAN = math.nan


def test_interval_over_seeds_is_the_t_interval_worked_by_hand():
    # Differences 0.5, 1.0, 0.3: mean 0.6, sum of squares 0.26, sd sqrt(0.13); t(0.975, 2) = 4.30265 from a table.
    found = paired_difference([40.0, 41.0, 42.0, NAN], [40.5, 42.0, 42.3, 1.0])
    half = 4.30265273 * math.sqrt(0.13 / 3)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.6), pytest.approx(math.sqrt(0.13)))
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
    assert math.isnan(summarize([3.0]).sd) and math.isnan(summarize([NAN]).mean)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, 0.5, 0.9], "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: better"),
        ([-1.0, -0.5, -0.9], "RePr -0.8 AP, 95 % CI -1.5 .. -0.1, 3 seeds: worse"),
        ([0.0, 0.5, -0.4], "RePr +0.0 AP, 95 % CI -1.1 .. +1.2, 3 seeds: not distinguishable"),
        ([1.0, -0.5], "RePr +0.2 AP, 95 % CI -9.3 .. +9.8, 2 seeds: no verdict (fewer than 3 pairs of runs)"),
        ([0.5, 0.5, 0.5], "RePr +0.5 AP, 3 seeds: no verdict (all differences are equal)"),
        ([0.5, 0.5, NAN], "RePr +0.5 AP, 2 seeds: no verdict (1 of 3 pairs of runs without the value)"),
        ([0.8], "RePr +0.8 AP, 1 seed: no verdict (fewer than 3 pairs of runs)"),
        ([NAN, NAN], "AP: n/a (no pair of runs has it)"),
    ],
)
def test_verdict_in_words(values, sentence):
    found = paired_difference([0.0] * len(values), values)
    assert verdict_sentence("AP", found) == sentence
    shifted = paired_difference([30.0] * len(values), [30 + v for v in values])  # but for rounding
    assert shifted.verdict == found.verdict
    if found.why_no_verdict:  # then nothing is said of seeds
        assert could_show(found) == {"detectable": None, "seeds_for_1": None, "sentence": ""}


# Pairs for a power of 0.8 of a two-sided paired t test at 5 %, by the size in standard deviations: tables of G*Power.
@pytest.mark.parametrize(("size", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1e9, 3), (0.001, 10_001)])
def test_the_seeds_that_a_difference_of_1_needs(size, pairs):
    found = could_show(dataclasses.replace(paired_difference([0.0, 0.0, 0.0], [1.0, 0.5, 0.9]), sd=1 / size))
    assert found["seeds_for_1"] == pairs
    assert f"needs {pairs if pairs < 10_001 else 'more than 10000'} seeds" in found["sentence"]


@pytest.mark.parametrize("n", [3, 8])
def test_the_difference_that_seeds_could_have_shown_is_found_in_four_of_five_simulated_studies(n):
    values = np.random.default_rng(n).normal(0, 2, n)
    size = could_show(paired_difference(np.zeros(n), values))["detectable"]
    studies = np.random.default_rng(1).normal(size, values.std(ddof=1), (20_000, n))
    t = {3: 4.30265, 8: 2.36462}[n]  # t(0.975, n - 1) from a table
    better = studies.mean(axis=1) > t * studies.std(axis=1, ddof=1) / math.sqrt(n)
    assert better.mean() == pytest.approx(0.8, abs=0.01)


def test_one_form_of_numbers():
    assert [number(41.26), number(0.84, sign=True), number(NAN)] == ["41.3", "+0.8", "n/a"]


def test_metrics_of_a_resumed_run_count_once_and_a_torn_line_not_at_all(tmp_path):
    write_metrics(tmp_path, dict(iteration=19, total_loss=3.0), dict(iteration=39, total_loss=2.0))
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 59, "total_lo\n{"iteration": 39, "total_loss": 2.5}\n')
    assert {i: row["total_loss"] for i, row in read_metrics(tmp_path).items()} == {19: 3.0, 39: 2.5}


@pytest.mark.parametrize(
    ("iteration", "key", "finished"),
    [
        (99, "total_loss", False),
        (49, "bbox/AP", False),  # an evaluation on the way
        (100, "bbox/AP", True),
        (101, "bbox/AP", True),  # resumed after the last step
    ],
)
def test_finished_means_evaluated_after_the_last_iteration(tmp_path, iteration, key, finished):
    run = Run("repr", 1, tmp_path, 100)
    assert not is_finished(run)
    write_metrics(tmp_path, {"iteration": iteration, key: NAN})
    assert is_finished(run) == finished


@pytest.mark.parametrize(("number", "expected"), [(2, [(10, 20)]), (3, [(10, 20), (30, 40)])])
def test_sub_network_phases(number, expected):
    events = [{"event": ("drop", "restore")[i % 2], "iteration": 10 * i + 9} for i in range(number)]
    assert phases(events, max_iter=40) == expected
