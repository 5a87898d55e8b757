"""The report as parsed HTML, from made-up runs; once really from nothing to report. Its statistics against closed forms
and simulations."""

import dataclasses
import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import refused
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from finished_runs import METRICS, OPTS, REPR_CONFIG, compare_folders, results_of, write_lines

from repr_det.studies.comparison.command import main
from repr_det.studies.comparison.records import Run, Study, compare, metric_row
from repr_det.studies.comparison.report import filter_values, phases
from repr_det.studies.comparison.statistics import could_show, paired_difference, summarize, verdict_sentence


class Page:
    """Text, tags and addresses of a page, which is well-formed XML."""

    def __init__(self, folder):
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        root = ElementTree.fromstring(self.source)
        self.tags = [element.tag for element in root.iter()]
        self.text = " ".join(" ".join(root.find("body").itertext()).split())
        self.addresses = [value for x in root.iter() for name, value in x.items() if name in ("href", "src")]


def test_report_of_finished_folders(finished, tmp_path, capsys):
    more = ("MODEL.ROI_HEADS.NUM_CLASSES", 5)  # than the validation data list
    bases = [finished("baseline", s, *more) for s in (1, 2, 3)]
    others = [finished("repr", s, *more) for s in (3, 1, 2)]
    compare_folders(tmp_path, bases, others, "--eval-images", "4")
    out = tmp_path / "out"
    results, page, shown = results_of(out), Page(out), capsys.readouterr().out
    row = results["metrics"]["AP"]
    expected = [json.loads((folder / "metrics.json").read_text().splitlines()[3])["bbox/AP"] for folder in bases]
    assert row["baseline"]["values"] == pytest.approx(expected)
    table = pd.read_csv(out / "results.csv")
    assert list(table) == ["seed", "arm", "metric", "value"] and set(table["arm"]) == {"baseline", "repr"}
    assert set(table["metric"]) == {*METRICS, "AP-<b>bläu & “x”</b>", "AP-绿色/$g$"}
    found = table.query("metric == 'AP' and arm == 'baseline'").sort_values("seed")
    assert found["value"].tolist() == pytest.approx(expected, abs=1e-4)
    assert results["metrics"]["APl"]["difference"]["mean"] is None  # images of 96 px hold no large object
    for sentence in (results["verdict"], results["power"]["sentence"]):
        assert sentence in shown and sentence.rpartition(": ")[2] in page.text
    mean_and_sd = f"{np.mean(expected):.1f} ± {np.std(expected, ddof=1):.1f}"
    assert mean_and_sd in shown and mean_and_sd in page.text and "note:" not in shown

    assert "<b>bläu" not in page.source and "<title>RePr against baseline on odd_val</title>" in page.source
    words = ("not distinguishable", "n/a", "REPR.ENABLED False True", "AP of <b>bläu & “x”</b>", "绿色/$g$")
    folders = [f"../{folder.name}" for folder in (*bases, *others)]
    assert [word for word in (*METRICS, *words, *folders) if word not in page.text] == []
    assert page.tags.count("img") == 3 + 4 and "script" not in page.tags  # figures and pictures
    assert all(address.startswith("data:image/") for address in page.addresses)  # self-contained
    assert "@import" not in page.source and "url(http" not in page.source

    (out / "report.html").unlink()
    main(["--report-only", "--output", str(out), "--eval-images", "4"])
    assert Page(out).tags == page.tags and results_of(out) == results
    for content in ("{", "{}", "[]"):
        (out / "comparison.json").write_text(content)
        assert "comparison.json is damaged: " in refused(main, ["--report-only", "--output", str(out)])


def test_report_only_from_another_folder(finished, named_data, tmp_path, monkeypatch):
    """The data are found again; what is registered anew takes their place."""
    opts = ("DATASETS.TRAIN", "('near',)", "DATASETS.TEST", "('near',)")
    folders = [[finished(arm, 1, *opts)] for arm in ("baseline", "repr")]
    monkeypatch.chdir(named_data[0].parent)
    compare_folders(tmp_path, *folders, "--register", "near", "odd.json", "images")
    monkeypatch.chdir(tmp_path)
    main("--report-only --output out --eval-images 0".split())
    shutil.copytree(named_data[0].parent, tmp_path / "moved", symlinks=True)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("near")
    main("--report-only --output out --eval-images 0 --register near moved/odd.json moved/images".split())
    assert MetadataCatalog.get("near").json_file == str(tmp_path / "moved" / "odd.json")


def test_two_configs(finished, tmp_path, capsys):
    out, config = tmp_path / "out", tmp_path / "random.yaml"
    out.mkdir()
    config.write_text(f"_BASE_: {REPR_CONFIG}\nREPR: {{CRITERION: random}}\n")
    for seed, ap in ((1, 42.0), (2, 43.5), (3, 43.1)):
        finished("repr", seed, ap=ap, folder=out / f"repr_r50_fpn_seed{seed}")
        finished("repr", seed, "REPR.CRITERION", "random", ap=40.0 + seed, folder=out / f"random_seed{seed}")
    words = ["--config-file", REPR_CONFIG, "--against", str(config), "--seeds", "1", "2", "3", "--output", str(out)]
    main([*words, "--eval-images", "0", *OPTS])
    results, page = results_of(out), Page(out)
    assert results["metrics"]["AP"]["difference"]["values"] == pytest.approx([1.0, 1.5, 0.1])
    assert results["verdict"].startswith("repr_r50_fpn against random: +0.9 AP, ")
    assert results["verdict"] in capsys.readouterr().out
    assert "<title>repr_r50_fpn against random on odd_val</title>" in page.source
    assert "key random repr_r50_fpn REPR.CRITERION random ortho" in page.text
    main(["--report-only", "--output", str(out), "--eval-images", "0"])
    assert results_of(out) == results


def test_report_says_what_is_missing(finished, catalogs, tmp_path):
    """No drop took anything, and the data are on another machine; then there is no drop, and no detections."""
    register_coco_instances("gone", {}, str(tmp_path / "gone.json"), str(tmp_path))
    opts = ("DATASETS.TRAIN", "('gone',)", "DATASETS.TEST", "('gone',)")
    base, other = finished("baseline", 1, *opts), finished("repr", 1, *opts, ap=math.nan)
    for run in (base, other):
        write_lines(run / "data_sets.json", {"gone": dict(file="gone.json", sha256="ab", classes=["a"], images=5)})
    write_lines(other / "repr_events.jsonl", {"event": "drop", "iteration": 9, "dropped": {}})
    compare_folders(tmp_path, [base], [other], "--eval-images", "1")
    page, results = Page(tmp_path / "out"), results_of(tmp_path / "out")
    assert page.tags.count("img") == 3 and "nan" not in page.text.split()
    assert "AP: n/a (no pair of runs has it)" in page.text.replace(" :", ":")
    assert results["metrics"]["AP"]["repr"]["mean"] is None and results["metrics"]["AP50"]["difference"]["n"] == 1
    seed, collapsed, data = results["notes"]
    assert seed in page.text and collapsed.startswith(f"{other}: the AP of its last evaluation is NaN")
    assert data.startswith("No pictures of detections: data set gone: ") and data in page.text
    for run in (base, other):
        for name in ("inference/coco_instances_results.json", "repr_overlaps.jsonl"):
            (run / name).unlink(missing_ok=True)
    compare_folders(tmp_path, [base], [other], "--eval-images", "1")
    page = Page(tmp_path / "out")
    assert "Filters Bar" not in page.text and page.tags.count("img") == 1


def test_overlap_of_grouped_convs(finished):
    """Filters equal to those of other groups and orthogonal in their own, as training measures it."""
    opts = "MODEL.BACKBONE.NAME build_resnet_fpn_backbone MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.NUM_GROUPS 4".split()
    runs = [Run(arm, 1, finished(arm, 1, *opts), 40) for arm in ("baseline", "repr")]
    weight = torch.linalg.qr(torch.randn(72, 72))[0].repeat(4, 1).view(288, 8, 3, 3)
    torch.save({"model": {"backbone.bottom_up.res2.0.conv2.weight": weight}}, runs[1].folder / "model_final.pth")
    config = runs[0].folder / "config.yaml"
    config.write_text(config.read_text().replace("build_resnet_fpn_backbone", "their_own"))
    notes = []
    overlap = list(filter_values(Study(tuple(runs)), notes).values())[1]
    assert {arm for arm, *_ in overlap} == {"repr"} and max(value for *_, value in overlap) < 1e-6
    assert len(overlap) == 288 and len(notes) == 1
    assert notes[0].startswith("No O_f of baseline: MODEL: No object named 'their_own'")


def test_ap_over_training(finished):
    """The runs were resumed, and killed while they wrote a line."""
    runs = (Run(arm, 1, finished(arm, 1, ap=ap), 40) for arm, ap in (("baseline", 30.0), ("repr", math.nan)))
    curves = compare(Study(tuple(runs))).curves
    assert curves["baseline"][1].to_dict() == {20: 31.0, 40: 30.0} and curves["repr"][1].isna().all()


def test_a_pair_that_lacks_the_value_takes_no_part():
    aps = {"baseline": [31.0, 32.0, 33.0, 34.0], "repr": [50.0, math.nan, 52.0, 52.0]}
    lines = [(seed, arm, "AP", aps[arm][seed]) for arm in aps for seed in range(4)]
    table = pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])
    neither = pd.concat([table[table["seed"] != 1], table.assign(metric="AP50")])
    for found in (table, table.dropna(), neither):  # no objects; no line of a class that was never detected
        row = metric_row(found, "AP", ("baseline", "repr"))
        assert row["sentence"].endswith("3 seeds: no verdict (1 of 4 pairs of runs without the value)")
        assert row["baseline"]["mean"] == pytest.approx((31 + 33 + 34) / 3) and row["difference"]["n"] == 3


TRAINED = """SOLVER.MAX_ITER 6 SOLVER.STEPS () REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1
REPR.LAYERS.INCLUDE ['*.res2.*.conv*'] DATASETS.TRAIN ('odd_a',) DATASETS.TEST ('odd_b',) TEST.EVAL_PERIOD 6
MODEL.BACKBONE.NAME build_resnet_fpn_backbone""".split()


def test_from_nothing_to_report(named_data, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # its 2 for each of two runs at once would be too many
    out = tmp_path / "ütput"
    words = ["--config-file", REPR_CONFIG, "--seeds", "1", "--jobs", "2", "--output", str(out), "--eval-images", "2"]
    for name in ("odd_a", "odd_b"):
        words += ["--register", name, *map(str, named_data)]
    main([*words, *OPTS, *TRAINED])
    page = Page(out)
    assert "One seed says nothing" in page.text and page.tags.count("img") == 3 + 2
    assert len(list(out.glob("*/model_final.pth"))) == 2


def test_interval_over_seeds_is_the_t_interval_worked_by_hand():
    # Differences 0.5, 1.0, 0.3: mean 0.6, sum of squares 0.26, sd sqrt(0.13); t(0.975, 2) = 4.30265 from a table.
    found = paired_difference([40.0, 41.0, 42.0, math.nan], [40.5, 42.0, 42.3, 1.0])
    half = 4.30265273 * math.sqrt(0.13 / 3)
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.6), pytest.approx(math.sqrt(0.13)))
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
    assert math.isnan(summarize([3.0]).sd) and math.isnan(summarize([math.nan]).mean)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, 0.5, 0.9], "RePr +0.8 AP, 95 % CI +0.1 .. +1.5, 3 seeds: better"),
        ([-1.0, -0.5, -0.9], "RePr -0.8 AP, 95 % CI -1.5 .. -0.1, 3 seeds: worse"),
        ([0.0, 0.5, -0.4], "RePr +0.0 AP, 95 % CI -1.1 .. +1.2, 3 seeds: not distinguishable"),
        ([1.0, -0.5], "RePr +0.2 AP, 95 % CI -9.3 .. +9.8, 2 seeds: no verdict (fewer than 3 pairs of runs)"),
        ([0.5, 0.5, 0.5], "RePr +0.5 AP, 3 seeds: no verdict (all differences are equal)"),
        ([0.5, 0.5, math.nan], "RePr +0.5 AP, 2 seeds: no verdict (1 of 3 pairs of runs without the value)"),
        ([0.8], "RePr +0.8 AP, 1 seed: no verdict (fewer than 3 pairs of runs)"),
        ([math.nan, math.nan], "AP: n/a (no pair of runs has it)"),
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


def test_sub_network_phases():
    events = [{"event": ("drop", "restore")[i % 2], "iteration": 10 * i + 9} for i in range(3)]
    assert phases(events, max_iter=40) == [(10, 20), (30, 40)]
