"""The report as parsed HTML, from made-up runs; once really from nothing to report."""

import csv
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from finished_runs import OPTS, REPR_CONFIG, compare_folders, write_metrics

from repr_det.method.errors import UserError
from repr_det.studies.comparison.command import main
from repr_det.studies.comparison.detections import correct_detections, evenly_spaced
from repr_det.studies.comparison.matches import METRICS
from repr_det.studies.comparison.records import read_metrics

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Text, tags, ids and addresses of a page; refuses tags that do not nest."""

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.words, self.tags, self.ids, self.addresses, self.open = [], [], [], [], []
        self.feed(self.source.replace("<wbr>", ""))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split()).replace("\N{MINUS SIGN}", "-")


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_report_of_finished_folders(finished, tmp_path, capsys):
    bases = [finished("baseline", s) for s in (1, 2, 3)]
    others = [finished("repr", s) for s in (3, 1, 2)]
    compare_folders(tmp_path, bases, others, "--eval-images", "4")
    out = tmp_path / "out"
    results = results_of(out)
    row = results["metrics"]["AP"]
    expected = [json.loads((folder / "metrics.json").read_text().splitlines()[-1])["bbox/AP"] for folder in bases]
    assert row["baseline"]["values"] == pytest.approx(expected)
    assert row["baseline"]["sd"] == pytest.approx(np.std(expected, ddof=1))
    training = results["training"]
    assert training["lost"]["baseline"]["mean"] == pytest.approx(1.0)  # the best was 1 above the final
    for part in training.values():  # a higher loss is not better
        low, high = part["difference"]["low"], part["difference"]["high"]
        word = "no verdict"  # all pairs differ by the same
        if low is not None:
            word = "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"
        assert part["difference"]["verdict"] == word
    assert results["pairs"][0]["repr"]["best_iteration"] == 20
    images = [pair["images"]["AP"]["difference"] for pair in results["pairs"]]
    assert images == pytest.approx(row["difference"]["values"], abs=1e-9)
    assert row["images"]["difference"] == pytest.approx(row["difference"]["mean"], abs=1e-9)
    phases = dict(full=5.0, sub=5.0, after=10.0, transitions=0.5, evaluation=0, rest=0)
    assert results["time"]["repr"] == pytest.approx(phases)
    assert results["time"]["baseline"] == pytest.approx(phases | {"transitions": 0})  # by the iterations of its partner

    # One table, whose numbers have one form everywhere.
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        table = {line["name"]: line for line in csv.DictReader(file)}
    assert set(table) == {*METRICS, "AP-<b>bläu & “x”</b>", "AP-绿色/$g$"}
    assert [float(table["AP"][f"baseline_seed_{s}"]) for s in (1, 2, 3)] == pytest.approx(expected, abs=1e-4)
    assert float(table["AP"]["difference"]) == pytest.approx(row["difference"]["mean"], abs=1e-4)
    assert table["APl"]["difference"] == "n/a"  # images of 96 px hold no large object
    page, shown = Page(out), capsys.readouterr().out
    for sentence in (results["verdict"], results["power"]["sentence"]):
        assert sentence in shown and sentence.rpartition(": ")[2] in page.text
    mean_and_sd = f"{np.mean(expected):.1f} ± {np.std(expected, ddof=1):.1f}"
    assert mean_and_sd in shown and mean_and_sd in page.text and "note:" not in shown
    assert f"difference of 1 AP needs {results['power']['seeds_for_1']} seeds" in page.text

    assert "<b>bläu" not in page.source and "<b>bläu & “x”</b>" in page.text and "绿色/$g$" in page.text
    assert "<title>RePr against its baseline on odd_val</title>" in page.source
    for word in (*METRICS, "not distinguishable", "n/a", "95 % interval over images", "Settings", "SOLVER.MAX_ITER"):
        assert word in page.text, word
    for folder in (*bases, *others):
        assert os.path.relpath(folder, out) in page.text
    assert (page.tags.count("img"), page.tags.count("svg")) == (3, 4 * 3)  # figures; four images in three panels
    assert "script" not in page.tags and len(page.ids) == len(set(page.ids))
    # Self-contained: every address is inside the page.
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert "@import" not in page.source and "url(http" not in page.source

    (out / "report.html").unlink()
    main(["--report-only", "--output", str(out), "--train-images", "0", "--bootstrap", "50", "--eval-images", "4"])
    assert Page(out).tags == page.tags and results_of(out) == results


def test_two_configs(finished, tmp_path, capsys):
    out, config = tmp_path / "out", tmp_path / "random.yaml"
    out.mkdir()
    config.write_text(f"_BASE_: {REPR_CONFIG}\nREPR: {{CRITERION: random}}\n")
    for seed, ap in ((1, 42.0), (2, 43.5), (3, 43.1)):
        finished("repr", seed, ap=ap, folder=out / f"repr_r50_fpn_seed{seed}")
        finished("repr", seed, "REPR.CRITERION", "random", ap=40.0 + seed, folder=out / f"random_seed{seed}")
    words = ["--config-file", REPR_CONFIG, "--against", str(config), "--seeds", "1", "2", "3", "--output", str(out)]
    main([*words, "--train-images", "0", "--bootstrap", "50", *OPTS])
    results, page = results_of(out), Page(out)
    assert results["metrics"]["AP"]["difference"]["values"] == pytest.approx([1.0, 1.5, 0.1])
    assert results["verdict"].startswith("repr_r50_fpn against random: +0.9 AP, ")
    assert results["verdict"] in capsys.readouterr().out
    assert list(results["time"]) == ["random", "repr_r50_fpn"]
    for pair in results["pairs"]:  # the same detections in both arms: no difference on any list of images
        assert list(pair) == ["seed", "random", "repr_r50_fpn", "images"]
        assert pair["images"]["AP"] == dict(difference=0, low=0, high=0)
    assert "<title>repr_r50_fpn against random on odd_val</title>" in page.source
    assert "REPR.CRITERION random ortho" in page.text and "its baseline" not in page.text
    main(["--report-only", "--output", str(out), "--train-images", "0", "--bootstrap", "50"])
    assert results_of(out) == results


def test_a_comparison_of_0_2_0_still_gets_its_report(finished, tmp_path):
    compare_folders(tmp_path, [finished("baseline", 1)], [finished("repr", 1)])
    path = tmp_path / "out" / "comparison.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: settings[key] for key in ("command", "config_file", "register", "runs")}))
    main(["--report-only", "--output", str(tmp_path / "out"), "--train-images", "0", "--bootstrap", "0"])
    assert "RePr against its baseline on odd_val" in Page(tmp_path / "out").text
    path.write_text("{")
    with pytest.raises(UserError, match=r"comparison.json is damaged .*: run the comparison again"):
        main(["--report-only", "--output", str(tmp_path / "out")])


def test_report_says_what_is_missing(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1, ap=math.nan)
    shutil.rmtree(base / "inference")
    for name in ("repr_events.jsonl", "repr_overlaps.jsonl"):
        (other / name).unlink()
    compare_folders(tmp_path, [base], [other])
    page = Page(tmp_path / "out")
    assert "AP: n/a (no pair of runs has it)" in page.text.replace(" :", ":")
    assert "No bootstrap over images: " in page.text and "One seed says nothing" in page.text
    assert "Which filters were dropped" not in page.text and page.tags.count("img") == 1
    assert results_of(tmp_path / "out")["metrics"]["AP"]["repr"]["mean"] is None


def test_drops_that_took_nothing(finished, tmp_path):
    bases, others = ([finished(arm, seed) for seed in (1, 2)] for arm in ("baseline", "repr"))
    for other in others:
        events = [json.loads(line) for line in (other / "repr_events.jsonl").read_text().splitlines()]
        lines = [json.dumps(event | {"dropped": {}, "overlap_after": event["overlap_before"]}) for event in events]
        (other / "repr_events.jsonl").write_text("".join(line + "\n" for line in lines))
    compare_folders(tmp_path, bases, others)
    page = Page(tmp_path / "out")
    assert "Which filters were dropped" in page.text and "nan" not in page.words


def test_a_run_without_detections_counts_as_0(finished, tmp_path, capsys):
    bases = [finished("baseline", s, ap=30.0 + s) for s in (1, 2, 3, 4)]
    reprs = [finished("repr", s, ap=48.0 + s) for s in (1, 2, 3, 4)]
    # As Detectron2 leaves a run whose last evaluation found nothing: NaN for the areas, no line for the classes.
    rows = [json.loads(line) for line in (reprs[1] / "metrics.json").read_text().splitlines()]
    rows[-1] = {k: math.nan for k in rows[-1] if k.startswith("bbox/") and "-" not in k} | {"iteration": 40}
    write_metrics(reprs[1], *rows)
    (reprs[1] / "inference" / "coco_instances_results.json").write_text("[]")
    compare_folders(tmp_path, bases, reprs)
    results = results_of(tmp_path / "out")
    row = results["metrics"]["AP"]
    assert row["repr"]["values"] == [49.0, 0.0, 51.0, 52.0] and row["repr"]["mean"] == 38.0
    assert row["difference"]["n"] == 4 and row["difference"]["verdict"] == "not distinguishable"
    # The bootstrap over images counts it alike: its own detections, with which AP is 0.
    assert results["pairs"][1]["images"]["AP"]["difference"] < -10
    assert all(r["repr"]["values"][1] == 0 for r in results["classes"].values())
    assert results["metrics"]["APl"]["difference"]["n"] == 0  # images of 96 px hold no large object
    assert f"{reprs[1]}: its last evaluation has no detections, so its AP is 0" in capsys.readouterr().out


def test_another_nan_gives_no_verdict_and_a_note(finished, tmp_path, capsys):
    bases = [finished("baseline", s, ap=30.0 + s) for s in (1, 2, 3, 4)]
    reprs = [finished("repr", s, ap=48.0 + s + s % 2) for s in (1, 2, 3, 4)]
    shutil.rmtree(reprs[1] / "inference")
    rows = [json.loads(line) for line in (reprs[1] / "metrics.json").read_text().splitlines()]
    write_metrics(reprs[1], *rows[:-1], rows[-1] | {"bbox/AP": math.nan})
    compare_folders(tmp_path, bases, reprs)
    row = results_of(tmp_path / "out")["metrics"]["AP"]
    assert row["difference"]["verdict"] == "no verdict"
    assert row["sentence"].endswith("3 seeds: no verdict (1 of 4 pairs of runs lacks the value)")
    assert row["baseline"]["mean"] == pytest.approx((31 + 33 + 34) / 3)  # of the pairs that the difference is of
    assert "is NaN, and its detections are not at hand: no verdict" in capsys.readouterr().out


def test_runs_of_other_settings_stand_beside_the_arms(finished, tmp_path, capsys):
    bases = [finished("baseline", s, ap=40.0 + s) for s in (1, 2, 3)]
    reprs = [finished("repr", s, ap=41.0 + s) for s in (1, 2, 3)]
    weights = ("SOLVER.WEIGHT_DECAY", 0.001)
    decay = [
        finished("baseline", s, *weights, ap=ap, folder=tmp_path / f"decay_{s}") for s, ap in ((3, 44.0), (1, 43.0))
    ]
    long = finished("baseline", 2, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (30,), folder=tmp_path / "long")
    write_metrics(long, {"iteration": 60, "bbox/AP": 50.0})
    random = finished("repr", 2, "REPR.CRITERION", "random", ap=42.5, folder=tmp_path / "random")
    compare_folders(tmp_path, bases, reprs, "--other-runs", *map(str, (decay[0], random, decay[1], long)))
    out, shown = tmp_path / "out", capsys.readouterr().out
    rows = results_of(out)["others"]
    assert [(row["name"], row["arm"], row["seeds"]) for row in rows] == [
        ("baseline, SOLVER.WEIGHT_DECAY 0.001", "baseline", [1, 3]),
        ("RePr, REPR.CRITERION random", "repr", [2]),
        ("baseline, SOLVER.MAX_ITER 60, SOLVER.STEPS [30]", "baseline", [2]),
    ]
    assert rows[2]["settings"] == {"SOLVER.MAX_ITER": 60, "SOLVER.STEPS": [30]}
    # Seeds 1 and 3: 43 and 44; minus 41 and 43: 2 and 1, whose sd is 1 / sqrt(2); t(0.975, 1) = 12.7062 from a table.
    first = rows[0]
    assert (first["AP"]["mean"], first["minus_baseline"]["mean"], first["minus_repr"]["mean"]) == (43.5, 1.5, 0.5)
    assert first["minus_baseline"]["high"] == pytest.approx(1.5 + 12.7062 * 0.5, abs=1e-3)
    evaluations = [[row["bbox/AP"] for row in read_metrics(folder).values() if "bbox/AP" in row] for folder in decay]
    assert first["best"]["mean"] == pytest.approx(np.mean([max(values) for values in evaluations]))
    assert rows[1]["minus_repr"]["values"] == [-0.5] and rows[1]["minus_repr"]["verdict"] == "no verdict"
    page = Page(out)
    for row in rows:
        assert f"{row['name']} against RePr: " in shown and row["name"] in page.text
    assert "Other settings" in page.text and "../decay_3" in page.text

    main(["--report-only", "--output", str(out), "--train-images", "0", "--bootstrap", "0"])
    assert results_of(out)["others"] == rows


def test_detections_that_do_not_fit_are_noticed(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1, ap=12.0)
    for detections, message in (
        (None, f"{other}: the saved detections give AP .* metrics.json says 12.00"),
        ([dict(image_id=999, category_id=1, bbox=[0, 0, 5, 5], score=0.9)], f"{other} .* images that odd_val lacks"),
    ):
        if detections:
            (other / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        compare_folders(tmp_path, [base], [other])
        (note,) = results_of(tmp_path / "out")["notes"]
        assert re.search(message, note)


def test_runs_of_another_number_of_classes_still_get_their_table(finished, tmp_path):
    base, other = (finished(arm, 1, "MODEL.ROI_HEADS.NUM_CLASSES", 5) for arm in ("baseline", "repr"))
    compare_folders(tmp_path, [base], [other])
    found = results_of(tmp_path / "out")
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
    assert evenly_spaced(list(range(11)), 3) == [0, 5, 10] and evenly_spaced([1, 2], 6) == [1, 2]


# ---- the whole command, really training ----

TRAINED = """SOLVER.MAX_ITER 6 SOLVER.STEPS () REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 1
REPR.LAYERS.INCLUDE ['*.res2.*.conv*'] DATASETS.TRAIN ('odd_a',) DATASETS.TEST ('odd_b',) TEST.EVAL_PERIOD 6
MODEL.BACKBONE.NAME build_resnet_fpn_backbone""".split()


def test_from_nothing_to_report(named_data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # its 2 for each of two runs at once would be too many
    out = tmp_path / "ütput"
    words = ["--config-file", REPR_CONFIG, "--seeds", "1", "--jobs", "2", "--output", str(out)]
    words += ["--train-images", "4", "--bootstrap", "20", "--eval-images", "2"]
    for name in ("odd_a", "odd_b"):
        words += ["--register", name, *map(str, named_data)]
    main([*words, *OPTS, *TRAINED])
    results, page = results_of(out), Page(out)
    assert all(len(read_metrics(out / f"{arm}_seed1")) for arm in ("baseline", "repr"))
    assert "One seed says nothing" in page.text and "the runs evaluated once, at the end" in page.text
    assert results["training"]["final_loss"]["repr"]["values"][0] > 0
    assert results["training"]["train"]["images"] == 4
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")}
    assert len(stamps) == 2
    capsys.readouterr()
    main([*words, *OPTS, *TRAINED])  # again: nothing is trained
    assert "finished already: baseline seed 1, RePr seed 1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/model_final.pth")} == stamps
    assert results_of(out) == results
