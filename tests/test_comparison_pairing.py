"""Runs that may be compared or not, and the plan of a comparison, from made-up runs."""

import json
import re

import pytest
import yaml
from conftest import refused
from detectron2.utils.events import EventStorage, JSONWriter
from finished_runs import BASELINE_CONFIG, OPTS, REPR_CONFIG, compare_folders, results_of

from repr_det.datasets import register_coco_format
from repr_det.runs.record import PROCESSES_FILE, describe_data_set
from repr_det.studies.comparison.command import arm_names, main, parse, plan_study
from repr_det.studies.comparison.records import check_same_data, is_finished, read_metrics, run_from_folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", None, r"repr_1 has no evaluation .* after SOLVER.MAX_ITER 40: run .*/config.yaml --resume"),
        ("config.yaml", None, "repr_1/config.yaml is missing: give the OUTPUT_DIR"),
        ("config.yaml", "SEDE: 1", "repr_1/config.yaml: .*SEDE"),
        ("repr_events.jsonl", None, "repr_1 has REPR.ENABLED True, but no repr_events.jsonl: its trainer had"),
    ],
)
def test_what_is_no_finished_run_is_refused(finished, tmp_path, name, content, message):
    base, other = finished("baseline", 1), finished("repr", 1)
    (other / name).unlink()
    if content:
        (other / name).write_text(content)
    assert re.search(message, refused(compare_folders, tmp_path, [base], [other]))
    assert not (tmp_path / "out").exists()


def test_seeds_arms_and_settings_must_fit(finished, tmp_path):
    base, other, third = finished("baseline", 1), finished("repr", 1), finished("repr", 3)
    random, second = finished("baseline", -1), finished("baseline", 2)
    scheme, data = finished("repr", 2, "REPR.DROP_RATIO", 0.25), finished("repr", 4, "DATASETS.TRAIN", "('odd_val',)")
    other_data = "DATASETS.TRAIN is ['odd_train'] in the first and ['odd_val'] in the second"
    for bases, others, message in (
        ([base], [other, third], "no baseline run has SEED 3: runs are paired by seed"),
        ([base], [other, other], "are both RePr seed 1"),
        ([other], [other], "repr_1 has REPR.ENABLED True: it is no baseline run"),
        ([random], [other], "has SEED -1: runs are paired by seed, it must be 0 or more"),
        ([base, second], [other, scheme], "REPR.DROP_RATIO is 0.3 in the first and 0.25 in the second"),
        ([finished("baseline", 4)], [data], f"baseline_4 and {data} cannot be compared: {other_data}"),
    ):
        assert message in refused(compare_folders, tmp_path, bases, others)
    for folder, processes in ((base, "1"), (other, "2")):
        (folder / PROCESSES_FILE).write_text(processes)
    assert "number of processes is 1 in the first and 2 in the" in refused(compare_folders, tmp_path, [base], [other])
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_is_compared_by_its_settings_from_the_start(finished, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1)
    before, config = other / "config_until_0000019.yaml", (other / "config.yaml").read_text()
    before.write_text(config.replace("MAX_ITER: 40", "MAX_ITER: 20").replace("VIS_PERIOD: 0", "VIS_PERIOD: 5"))
    compare_folders(tmp_path, [base], [other])
    note = f"{before}: SOLVER.MAX_ITER was 20 and became 40."
    assert note in results_of(tmp_path / "out")["notes"] and note in (tmp_path / "out" / "report.html").read_text()
    for folder, name, processes in ((base, "", 1), (other, "", 1), (other, "_until_0000019", 2)):
        (folder / f"processes{name}.json").write_text(str(processes))
        compare_folders(tmp_path, [base], [other])  # first a version without record is compared with one that has it
    assert f"{before}: number of processes was 2 and became 1." in results_of(tmp_path / "out")["notes"]
    # The baseline has no REPR to differ in.
    changes = ((base, "SOLVER", "BASE_LR", "0.005", "0.5"), (other, "REPR", "CRITERION", "ortho", "random"))
    for first, node, key, old, new in changes:
        before.write_text(config.replace(f"{key}: {old}", f"{key}: {new}"))
        message = f"{first} and {before} cannot be compared: {node}.{key} is {old} in the first and {new} in the"
        assert message in refused(compare_folders, tmp_path, [base], [other])


def test_max_iter_is_that_of_the_scaled_config(finished):
    """SOLVER.REFERENCE_WORLD_SIZE 2 and one process: twice as many iterations."""
    folder = finished("baseline", 1, "SOLVER.REFERENCE_WORLD_SIZE", 2)  # evaluated after 40 of 80 iterations
    path = folder / PROCESSES_FILE
    for message in (f"write the number of its processes into {path}", f"{path} is damaged: invalid literal"):
        assert message in refused(run_from_folder, folder, "baseline")
        path.write_text("two")
    for processes, iterations in ((2, 40), (4, 20), (1, 80)):
        path.write_text(str(processes))
        run = run_from_folder(folder, "baseline")
        assert run.max_iter == iterations and is_finished(run) == (iterations == 40)


def test_metrics_are_those_of_the_last_run_in_a_folder(tmp_path):
    """As Detectron2 writes them: an evaluation after iteration 14 stands behind the losses of 19."""
    for steps in (60, 40):
        writer = JSONWriter(str(tmp_path / "metrics.json"))
        with EventStorage() as storage:
            for storage.iter in range(steps):
                storage.put_scalar("loss", storage.iter)
                if storage.iter % 15 == 14:
                    storage.put_scalar("bbox/AP", storage.iter)
                if storage.iter % 20 == 19:
                    writer.write()
        writer.close()
    found = {i: set(row) - {"iteration"} for i, row in read_metrics(tmp_path).items()}
    assert found == {14: {"bbox/AP"}, 19: {"loss"}, 29: {"bbox/AP"}, 39: {"loss"}}


def test_runs_on_other_data_of_one_name_are_refused(finished, named_data, tmp_path):
    base, other = finished("baseline", 1), finished("repr", 1)

    def recorded(folder, name="data_sets.json", **changed):
        record = {name: describe_data_set(name) for name in ("odd_train", "odd_val")}
        record["odd_val"] |= changed
        (folder / name).write_text(json.dumps(record))

    recorded(base)  # the other is of a version that kept no record
    check_same_data([base, other])
    for changed in ({"file": "/elsewhere/odd.json"}, {"sha256": None}):
        recorded(other, **changed)
        assert check_same_data([base, other]) == []
    recorded(other, image_root="/denoised")
    folders = f"in {named_data[1]} for {base}, in /denoised for {other}."
    compare_folders(tmp_path, [base], [other])
    assert f"The images of odd_val were those {folders}" in results_of(tmp_path / "out")["notes"]
    recorded(other, sha256=None, images=3)
    assert "odd_val was" in refused(check_same_data, [base, other])
    recorded(other)
    recorded(other, "data_sets_until_0000019.json", file="old.json", sha256="0" * 64)  # before it was resumed
    words = f"odd_val was {named_data[0]} in the first and old.json, with other content, in the second"
    line = refused(compare_folders, tmp_path, [base], [other])
    assert line == f"{base} and {other} cannot be compared: {words}"
    recorded(base, file="old.json", sha256="0" * 64)
    assert "and this command cannot be compared: odd_val was old.json in the first" in refused(check_same_data, [base])


WAYS = "give --config-file and --seeds, or --baseline-runs, --repr-runs and --output, or --report-only and --output"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", WAYS),
        ("--baseline-runs a --repr-runs b --output o --against x", WAYS),
        ("--report-only --output nowhere", "holds no comparison"),
        ("--config-file x.yaml --seeds 1", "'x.yaml' is not a file"),
        ("--config-file x.yaml --seeds 1 two", "--seeds must be integers, and KEY VALUE pairs may follow; got 1 two"),
        ("--jobs 0 --config-file x --seeds 1", "--jobs must be at least 1, got 0"),
    ],
)
def test_arguments_that_make_no_comparison(words, message):
    assert message in refused(main, words.split())


@pytest.mark.parametrize("between", ["", "-- ", "--jobs 2 "])
def test_pairs_behind_the_seeds(between):
    args = parse(f"--config-file x.yaml --seeds 1 -2 3 {between}SOLVER.BASE_LR 0.005".split())
    assert (args.seeds, args.opts) == ([1, -2, 3], ["SOLVER.BASE_LR", "0.005"])


def planned(folder, *opts, seeds=(1,), config=REPR_CONFIG, against=""):
    return plan_study(config, seeds, folder, opts=opts, against=against)[0]


def test_plan(named_data, catalogs, tmp_path):
    content = json.loads(named_data[0].read_text(encoding="utf-8"))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    register_coco_format("odd_bare", bare, named_data[1])
    runs = planned(tmp_path, *OPTS, seeds=[4, 2]).runs
    assert [run.folder.name for run in runs] == ["baseline_seed4", "repr_seed4", "baseline_seed2", "repr_seed2"]
    assert all(run.arguments[-4:] == ("SEED", str(run.seed), "OUTPUT_DIR", str(run.folder)) for run in runs)
    assert [("--baseline" in run.arguments) for run in runs] == [True, False, True, False]
    scaled = planned(tmp_path, *OPTS, "SOLVER.REFERENCE_WORLD_SIZE", "2")
    assert [run.max_iter for run in scaled.runs] == [80, 80]  # one process, while the config is made for two
    never = OPTS.index("TEST.EVAL_PERIOD")
    seldom = planned(tmp_path, *OPTS[:never], *OPTS[never + 2 :])
    assert all(run.arguments[-6:-4] == ("TEST.EVAL_PERIOD", "4") for run in seldom.runs)
    for config, words, message in (
        (REPR_CONFIG, ["SEED", "3"], "SEED on the command line"),
        (REPR_CONFIG, ["DATASETS.TEST", "('odd_val', 'odd_train')"], "DATASETS.TEST must name one data set"),
        (REPR_CONFIG, ["DATASETS.TEST", "('odd_bare',)"], f"odd_bare: {bare}: has no 'annotations', which"),
        (BASELINE_CONFIG, [], "REPR.ENABLED False: give a config with RePr, or one --against it"),
    ):
        assert message in refused(planned, tmp_path, *OPTS, *words, config=config)


def test_plan_of_two_configs(named_data, tmp_path):
    warm = tmp_path / "warm up.yaml"
    warm.write_text(f"_BASE_: {BASELINE_CONFIG}\nSOLVER: {{WARMUP_METHOD: constant}}\n")
    study, output = plan_study(str(warm), [3, 1], opts=OPTS, against=REPR_CONFIG)
    assert study.arms == ("repr_r50_fpn", "warm up") and study.seeds == [1, 3]
    assert [run.folder.name for run in study.runs[:2]] == ["repr_r50_fpn_seed3", "warm up_seed3"]
    assert [run.arguments[1] for run in study.runs[:2]] == [REPR_CONFIG, str(warm)]
    assert not any("--baseline" in run.arguments for run in study.runs)
    assert output.name == "baseline_r50_fpn_comparison"
    for change, message in (
        ("SOLVER: {MAX_ITER: 50}", "SOLVER.MAX_ITER is 90000 in the first and 50 in the second"),
        ("DATASETS: {TEST: [coco_2017_train]}", "DATASETS.TEST is ['coco_2017_val'] in the first and ['coco_2017_tr"),
        ("SOLVER: {IMS_PER_BATCH: 4}", "SOLVER.IMS_PER_BATCH is 16 in the first and 4 in the second"),
        ("DATALOADER: {SAMPLER_TRAIN: RandomSubsetTrainingSampler}", "DATALOADER.SAMPLER_TRAIN is Training"),
    ):
        warm.write_text(f"_BASE_: {BASELINE_CONFIG}\n{change}\n")
        line = refused(planned, tmp_path / "out", config=str(warm), against=REPR_CONFIG)
        assert line.startswith(f"{REPR_CONFIG} and {warm} cannot be compared: {message}")


def test_arms_are_named_after_their_configs():
    assert arm_names("a/config.yaml", "b/config.yaml") == ("a_config", "b_config")
    assert arm_names("a/baseline.yaml", "a/repr.yaml") == ("a_baseline", "a_repr")  # any two configs
    for files in (("a/x.yaml", "a/x.yml"), ("a/difference.yaml", "b/x.yaml")):
        assert "rename one" in refused(arm_names, *files)


def test_folders_that_hold_runs_already(finished, named_data, tmp_path):
    """Those of this comparison are continued, also if their version lacked an option of today; others are refused."""
    folders = [finished(arm, 1, folder=tmp_path / f"{arm}_seed1") for arm in ("baseline", "repr")]
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        del config["REPR"]["REINIT"]["RETURN"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    without_effect = ("SOLVER.CHECKPOINT_PERIOD", "7", "VIS_PERIOD", "3")
    assert [run.folder for run in planned(tmp_path, *OPTS, *without_effect).runs] == folders
    for folder, key, held, wanted in (
        ("baseline_seed1", "SOLVER.BASE_LR", "0.005", "0.5"),
        ("repr_seed1", "REPR.REINIT.RETURN", "as_published", "function_preserving"),
    ):
        message = f"{folder} and this command cannot be compared: {key} is {held} in the first and {wanted} in the"
        assert message in refused(planned, tmp_path, *OPTS, key, wanted)
    (folders[0] / PROCESSES_FILE).write_text("2")
    assert "this command cannot be compared: number of processes is 2 in" in refused(planned, tmp_path, *OPTS)
    (folders[0] / PROCESSES_FILE).unlink()
    before = (folders[1] / "config.yaml").read_text().replace("BASE_LR: 0.005", "BASE_LR: 0.5")
    (folders[1] / "config_until_0000019.yaml").write_text(before)
    assert "config_until_0000019.yaml cannot be compared: SOLVER.BASE_LR is 0.005" in refused(planned, tmp_path, *OPTS)
    (folders[1] / "config_until_0000019.yaml").unlink()
    (folders[1] / "data_sets.json").write_text(json.dumps({"odd_val": {"sha256": "0" * 64, "file": "old.json"}}))
    line = refused(planned, tmp_path, *OPTS, seeds=[1, 2])
    assert "repr_seed1 and this command cannot be compared: odd_val was old.json in the first and" in line
    (folders[1] / "data_sets.json").unlink()
    (folders[0] / "config.yaml").write_text((folders[1] / "config.yaml").read_text())
    assert "baseline_seed1 and this command cannot be compared: REPR.ENABLED is" in refused(planned, tmp_path, *OPTS)
