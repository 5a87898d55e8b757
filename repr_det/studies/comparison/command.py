"""``repr-det compare``: from a config and seeds, or finished folders, to results and report."""

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from repr_det.commands.arguments import add_data_argument, build_config, refuse_below
from repr_det.commands.checks import check_run
from repr_det.commands.processes import refuse_launchers
from repr_det.datasets import check_registered, register_builtin, register_coco_format
from repr_det.detectron.config import as_user_error, scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import run_traces, write_atomically
from repr_det.runs.record import CONFIG_FILE
from repr_det.studies.comparison.records import (
    BASELINE,
    REPR,
    WITHOUT_EFFECT,
    Run,
    Study,
    check_comparable,
    check_same_data,
    compare,
    is_finished,
    metrics_table,
    read_json,
    refuse_differences,
    run_from_folder,
    settings_by,
    settings_of_parts,
    write_results,
)
from repr_det.studies.comparison.report import write_report
from repr_det.studies.comparison.runner import run_all, say

_SETTINGS_FILE = "comparison.json"  # the request, for --report-only
_DESCRIPTION = """Compares RePr with its baseline, or a config with another: same seeds, data order and iterations.

  from a config:          --config-file shapes_r18_fpn.yaml --seeds 1 2 3 [KEY VALUE ...]
  from two configs:       --config-file A.yaml --against B.yaml --seeds 1 2 3 [KEY VALUE ...]
  from finished folders:  --baseline-runs A1 A2 --repr-runs B1 B2 --output DIR
  only the report:        --report-only --output DIR

The same command continues what was stopped. TEST.EVAL_PERIOD 0 becomes a tenth of MAX_ITER unless it is a KEY VALUE.
"""
# Arguments that each way needs, and others that it takes.
_WAYS = (
    ({"config_file", "seeds"}, {"against", "opts"}),
    ({"baseline_runs", "repr_runs", "output"}, set()),
    ({"report_only", "output"}, set()),
)
_HOW = "--config-file and --seeds, or --baseline-runs, --repr-runs and --output, or --report-only and --output"
_EVERY_WAY = {"output", "jobs", "num_gpus", "eval_images", "register"}
_OWN_KEYS = {"SEED": "--seeds", "OUTPUT_DIR": "--output", "REPR.ENABLED": "the arm"}
_TAKEN = {"difference", "sentence", "verdict"}  # names beside arms in results


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", help="config with RePr, or any with --against")
    parser.add_argument("--against", default="", help="config of the reference (default: its baseline)")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED")
    for arm in (BASELINE, REPR):
        parser.add_argument(f"--{arm}-runs", type=Path, nargs="+", default=[], metavar="DIR", help="finished folders")
    parser.add_argument("--output", type=Path, help="default: OUTPUT_DIR with the suffix _comparison")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each run (default 1)")
    parser.add_argument("--eval-images", type=int, default=6, help="validation images in the report (default 6)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, make the report of --output again")
    add_data_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs for every run")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses arguments; argparse takes KEY VALUE pairs behind the seeds for seeds."""
    args = argument_parser().parse_args(argv)
    words = args.seeds
    seeds = list(itertools.takewhile(re.compile(r"-?\d+").fullmatch, words))
    args.seeds, behind = list(map(int, seeds)), words[len(seeds) :]
    if behind and (not seeds or len(behind) % 2):
        raise UserError(f"--seeds must be integers, and KEY VALUE pairs may follow; got {' '.join(words)}")
    args.opts = behind + (args.opts[1:] if args.opts[:1] == ["--"] else args.opts)
    args.register = [[name, *(os.path.abspath(os.path.expanduser(x)) for x in paths)] for name, *paths in args.register]
    refuse_below(args, jobs=1, num_gpus=1, eval_images=0)
    given = {name for name, value in vars(args).items() if value}
    if not any(needed <= given <= needed | more | _EVERY_WAY for needed, more in _WAYS):
        raise UserError(f"give {_HOW}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the command, inside ``runner.run_comparison_tool``."""
    args = parse(argv)
    refuse_launchers("compare.py")
    if args.report_only:
        study, settings = _remembered(args.output, args.register)
    elif args.config_file:
        request = (args.config_file, args.seeds, args.output, args.register, args.opts, args.num_gpus, args.against)
        study, args.output = plan_study(*request)
        say(f"{len(study.runs)} runs of {study.runs[0].max_iter} iterations, {args.jobs} at once, in {args.output}")
        run_all(study.runs, args.jobs, args.num_gpus)
    else:
        runs = [run_from_folder(folder, BASELINE) for folder in args.baseline_runs]
        study = Study((*runs, *(run_from_folder(folder, REPR) for folder in args.repr_runs)))
    if not args.report_only:
        settings = _settings(args, study, sys.argv[1:] if argv is None else argv)
    register_builtin()
    for words in settings["register"]:
        register_coco_format(*words)
    notes = check_comparable(study)
    with as_user_error(f"--output {args.output} cannot be written"):
        args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / _SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False))
    comparison = compare(study, notes)
    report = write_report(comparison, settings, args.output, args.eval_images)
    results = comparison.results
    write_results(comparison, args.output)
    print(f"\n{metrics_table(results, study.arms)}\n\n{results['verdict']}")
    if results["power"]["sentence"]:
        print(results["power"]["sentence"])
    for note in results["notes"]:
        print(f"note: {note}")
    print(f"\nReport: {report}")


def plan_study(
    config_file: str,
    seeds: Sequence[int],
    output: Path | None = None,
    register: Sequence[Sequence[str]] = (),
    opts: Sequence[str] = (),
    num_gpus: int = 1,
    against: str = "",
) -> tuple[Study, Path]:
    """Plans both arms for every seed, in folders of ``output`` (default OUTPUT_DIR with the suffix _comparison), also
    returned; ``against`` is the config of the reference (default the baseline of ``config_file``).

    Raises:
        UserError: a run would not start, or a folder holds another one.
    """
    opts = list(opts)
    for key in opts[::2]:
        if key in _OWN_KEYS:
            raise UserError(f"{key} on the command line: a comparison sets it by {_OWN_KEYS[key]}")
    cfg = build_config(config_file, opts, register)
    if not against and not cfg.REPR.ENABLED:
        raise UserError(f"{config_file} has REPR.ENABLED False: give a config with RePr, or one --against it")
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST must name one data set, got {list(cfg.DATASETS.TEST)}")
    if cfg.TEST.EVAL_PERIOD == 0 and "TEST.EVAL_PERIOD" not in opts[::2]:
        opts += ["TEST.EVAL_PERIOD", str(max(1, cfg.SOLVER.MAX_ITER // 10))]
    output = output or Path(cfg.OUTPUT_DIR.rstrip("/") + "_comparison")
    arms = {BASELINE: config_file, REPR: config_file}
    if against:
        files = (against, config_file)
        arms = dict(zip(arm_names(*files), files, strict=True))
        configs = {file: settings_by(num_gpus, build_config(file, opts, register)) for file in files}
        refuse_differences(configs, only_shared=True)
    runs = []
    for seed in seeds:
        for arm, file in arms.items():
            folder = output / f"{arm}_seed{seed}"
            own = [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
            baseline = not against and arm == BASELINE
            own_cfg = build_config(file, own, register, baseline)
            flags = ["--config-file", file, *(["--baseline"] if baseline else []), "--num-gpus", str(num_gpus)]
            for words in register:
                flags += ["--register", *words]
            max_iter = scale_to_world(own_cfg, num_gpus).SOLVER.MAX_ITER
            runs.append(Run(arm, seed, folder, max_iter, (*flags, *own)))
            _check_run(runs[-1], own_cfg, num_gpus)
    check_same_data([run.folder for run in runs])
    return Study(tuple(runs)), output


def arm_names(*config_files: str) -> tuple[str, ...]:
    """The stems of the files, behind their folders' names if the stems are equal, or those of RePr and its baseline."""
    paths = [Path(file).resolve() for file in config_files]
    names = tuple(path.stem for path in paths)
    if names[0] == names[1] or names == (BASELINE, REPR):
        names = tuple(f"{path.parent.name}_{path.stem}" for path in paths)
    if names[0] == names[1] or _TAKEN.intersection(names):
        raise UserError(f"{' and '.join(config_files)} give their names to the arms: rename one")
    return names


def _check_run(run: Run, cfg: CfgNode, num_gpus: int) -> None:
    if (run.folder / CONFIG_FILE).exists():
        parts, _ = settings_of_parts(run.folder)
        configs = {**parts, "this command": settings_by(num_gpus, cfg)}
        refuse_differences(configs, WITHOUT_EFFECT)
    if not is_finished(run):
        check_run(cfg, resume=bool(run_traces(run.folder)), num_gpus=num_gpus)
        check_registered(cfg.DATASETS.TEST[0], for_objects=True)


def _settings(args: argparse.Namespace, study: Study, argv: list[str]) -> dict[str, Any]:
    program = sys.argv[0] if sys.argv[0].startswith("repr-det") else "python tools/compare.py"
    runs = [(run, os.path.relpath(run.folder, args.output)) for run in study.runs]
    return {
        "command": f"{program} {shlex.join(argv)}",
        "register": args.register,
        "runs": [{"arm": x.arm, "seed": x.seed, "folder": y, "max_iter": x.max_iter} for x, y in runs],
    }


def _remembered(output: Path, register: Sequence[Sequence[str]]) -> tuple[Study, dict[str, Any]]:
    path = output / _SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {output} holds no comparison")
    settings = read_json(path)
    with as_user_error(f"{path} is damaged"):
        folders = [Path(os.path.normpath(output / run["folder"])) for run in settings["runs"]]
        runs = [Run(x["arm"], x["seed"], y, x["max_iter"]) for x, y in zip(settings["runs"], folders, strict=True)]
        data = {name: paths for name, *paths in (*settings["register"], *register)}
    settings["register"] = [[name, *paths] for name, paths in data.items()]
    return Study(tuple(runs)), settings
