"""Which runs may be compared, and the report as parsed HTML, from made-up runs; once really from nothing to report."""

import contextlib
import csv
import io
import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALL, coco_of

from repr_det.comparison.command import main
from repr_det.comparison.evaluation import evenly_spaced
from repr_det.comparison.gallery import correct_detections
from repr_det.comparison.matches import METRICS, average_precision, match
from repr_det.comparison.pairing import first_difference
from repr_det.comparison.plan import plan_runs
from repr_det.comparison.records import read_metrics
from repr_det.datasets import register_coco_format
from repr_det.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def _metrics(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
            result = average_precision(match(coco_of(truth), detections), np.ones((1, 12)))
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


def test_runs_of_a_version_without_an_option_of_today_are_continued(finished, named_data, tmp_path):
    folders = [finished(arm, 1, folder=tmp_path / f"{arm}_seed1") for arm in ("baseline", "repr")]
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        del config["REPR"]["REINIT"]["RETURN"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    opts = [*SMALL, "DATASETS.TRAIN", "('odd_train',)", "DATASETS.TEST", "('odd_val',)", "SOLVER.MAX_ITER", "40"]
    opts[opts.index("SEED") : opts.index("SEED") + 2] = []
    config = str(ROOT / "configs" / "repr_r50_fpn.yaml")
    opts += ["TEST.EVAL_PERIOD", "20"]
    runs, _ = plan_runs(config, [1], tmp_path, opts=opts, evaluations=10)
    assert [run.folder for run in runs] == folders
    with pytest.raises(
        UserError, match=r"repr_seed1 holds a run with REPR.REINIT.RETURN as_published, but .* has median"
    ):
        plan_runs(config, [1], tmp_path, opts=[*opts, "REPR.REINIT.RETURN", "median_gamma"], evaluations=10)


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
    training = results["training"]
    assert training["lost"]["baseline"]["mean"] == pytest.approx(1.0)  # the best was 1 above the final
    for part in training.values():  # a higher loss is not better
        low, high = part["difference"]["low"], part["difference"]["high"]
        word = "higher" if low > 0 else "lower" if high < 0 else "not distinguishable"
        assert part["difference"]["verdict"] == word
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
