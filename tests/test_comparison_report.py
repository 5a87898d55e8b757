"""The report as parsed HTML, from made-up runs; once really from nothing to report."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from finished_runs import METRICS, OPTS, REPR_CONFIG, compare_folders, results_of, write_lines

from repr_det.method.errors import UserError
from repr_det.studies.comparison.command import main
from repr_det.studies.comparison.records import Run, Study, compare, metric_row


class Page:
    """Text, tags and addresses of a page, which is well-formed XML."""

    def __init__(self, folder):
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        root = ElementTree.fromstring(self.source)
        self.tags = [element.tag for element in root.iter()]
        self.text = " ".join(" ".join(root.find("body").itertext()).split())
        self.addresses = [one for element in root.iter() for one in (element.get("href"), element.get("src")) if one]


def test_report_of_finished_folders(finished, tmp_path, capsys):
    bases = [finished("baseline", s) for s in (1, 2, 3)]
    others = [finished("repr", s) for s in (3, 1, 2)]
    compare_folders(tmp_path, bases, others, "--eval-images", "4")
    out = tmp_path / "out"
    results, page, shown = results_of(out), Page(out), capsys.readouterr().out
    row = results["metrics"]["AP"]
    expected = [json.loads((folder / "metrics.json").read_text().splitlines()[-1])["bbox/AP"] for folder in bases]
    assert row["baseline"]["values"] == pytest.approx(expected)
    # One table, whose numbers have one form everywhere.
    table = pd.read_csv(out / "results.csv")
    assert list(table) == ["seed", "arm", "metric", "value"] and set(table["arm"]) == {"baseline", "repr"}
    assert set(table["metric"]) == {*METRICS, "AP-<b>bläu & “x”</b>", "AP-绿色/$g$"}
    found = table[(table["metric"] == "AP") & (table["arm"] == "baseline")].sort_values("seed")
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
    # Self-contained: every address is inside the page.
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "@import" not in page.source and "url(http" not in page.source

    # A comparison of 0.2.0 did not say that it is one of baseline and RePr.
    settings = json.loads((out / "comparison.json").read_text())
    del settings["any_config"]
    (out / "comparison.json").write_text(json.dumps(settings))
    (out / "report.html").unlink()
    main(["--report-only", "--output", str(out), "--eval-images", "4"])
    assert Page(out).tags == page.tags and results_of(out) == results
    (out / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"comparison.json is damaged: "):
        main(["--report-only", "--output", str(out)])


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


def test_report_says_what_is_missing(finished, tmp_path):
    """No drop took anything; then there is none, no detections, and no data of the model's classes."""
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 5)
    base, other = finished("baseline", 1, *opts), finished("repr", 1, *opts, ap=math.nan)
    write_lines(other / "repr_events.jsonl", {"event": "drop", "iteration": 9, "dropped": {}})
    compare_folders(tmp_path, [base], [other], "--eval-images", "1")
    page, results = Page(tmp_path / "out"), results_of(tmp_path / "out")
    assert page.tags.count("img") == 3 and "nan" not in page.text.split()
    assert "AP: n/a (no pair of runs has it)" in page.text.replace(" :", ":")
    assert results["metrics"]["AP"]["repr"]["mean"] is None and results["metrics"]["AP50"]["difference"]["n"] == 1
    seed, collapsed, data = results["notes"]
    assert seed in page.text and collapsed.startswith(f"{other}: the AP of its last evaluation is NaN")
    assert "NUM_CLASSES is 5, but odd_val has 2 classes" in data and data in page.text
    for run in (base, other):
        for name in ("inference/coco_instances_results.json", "repr_events.jsonl", "repr_overlaps.jsonl"):
            (run / name).unlink(missing_ok=True)
    compare_folders(tmp_path, [base], [other], "--eval-images", "1")
    page = Page(tmp_path / "out")
    assert "Filters Bar" not in page.text and page.tags.count("img") == 1


def test_ap_over_training(finished):
    runs = (Run(arm, 1, finished(arm, 1, ap=ap), 40) for arm, ap in (("baseline", 30.0), ("repr", math.nan)))
    curves = compare(Study(tuple(runs))).curves
    assert curves["baseline"][1].to_dict() == {20: 31.0, 40: 30.0} and curves["repr"][1].isna().all()


def test_a_pair_that_lacks_the_value_takes_no_part():
    aps = {"baseline": [31.0, 32.0, 33.0, 34.0], "repr": [50.0, math.nan, 52.0, 52.0]}
    lines = [(seed, arm, "AP", aps[arm][seed]) for arm in aps for seed in range(4)]
    table = pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])
    for found in (table, table.dropna()):  # no objects; no line of a class that was never detected
        row = metric_row(found, "AP", ("baseline", "repr"))
        assert row["sentence"].endswith("3 seeds: no verdict (1 of 4 pairs of runs without the value)")
        assert row["baseline"]["mean"] == pytest.approx((31 + 33 + 34) / 3) and row["difference"]["n"] == 3


TRAINED = """SOLVER.MAX_ITER 6 SOLVER.STEPS () REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1
REPR.LAYERS.INCLUDE ['*.res2.*.conv*'] DATASETS.TRAIN ('odd_a',) DATASETS.TEST ('odd_b',) TEST.EVAL_PERIOD 6
MODEL.BACKBONE.NAME build_resnet_fpn_backbone""".split()


def test_from_nothing_to_report(named_data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # its 2 for each of two runs at once would be too many
    out = tmp_path / "ütput"
    words = ["--config-file", REPR_CONFIG, "--seeds", "1", "--jobs", "2", "--output", str(out), "--eval-images", "2"]
    for name in ("odd_a", "odd_b"):
        words += ["--register", name, *map(str, named_data)]
    main([*words, *OPTS, *TRAINED])
    results, page = results_of(out), Page(out)
    assert "One seed says nothing" in page.text and page.tags.count("img") == 3 + 2
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")}
    assert len(stamps) == 2
    capsys.readouterr()
    main([*words, *OPTS, *TRAINED])  # again: nothing is trained
    assert "finished already: baseline seed 1, RePr seed 1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")} == stamps
    assert results_of(out) == results
