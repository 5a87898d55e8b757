"""The command ``repr-det compare``: from a config and seeds, or from finished folders, to results and report."""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from repr_det.commands.arguments import add_data_argument
from repr_det.commands.processes import refuse_launchers
from repr_det.datasets import register_builtin, register_coco_format
from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically
from repr_det.studies.comparison.plan import plan_study
from repr_det.studies.comparison.records import (
    BASELINE,
    REPR,
    Run,
    Study,
    check_comparable,
    check_finished,
    check_pairs,
    read_json,
    run_from_folder,
)
from repr_det.studies.comparison.report import write_report
from repr_det.studies.comparison.runner import run_all, say
from repr_det.studies.comparison.table import compare, metrics_table, write_results

_SETTINGS_FILE = "comparison.json"  # how the comparison was asked for, for --report-only
_DESCRIPTION = """Compares RePr with its baseline, or a config with another: same seeds, data order and iterations.

  from a config:          --config-file configs/shapes_r18_fpn.yaml --seeds 1 2 3 [KEY VALUE ...]
  from two configs:       --config-file A.yaml --against B.yaml --seeds 1 2 3 [KEY VALUE ...]
  from finished folders:  --baseline-runs A1 A2 --repr-runs B1 B2 --output DIR
  only the report:        --report-only --output DIR

The output folder gets report.html, results.json and results.csv; the same command continues what was stopped.
TEST.EVAL_PERIOD 0 becomes a tenth of MAX_ITER unless it is given as KEY VALUE.
"""


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", help="config with RePr, or any with --against")
    parser.add_argument("--against", default="", help="config of the reference (default: its baseline)")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED")
    for arm in (BASELINE, REPR):
        parser.add_argument(f"--{arm}-runs", type=Path, nargs="+", default=[], metavar="DIR", help="finished folders")
    parser.add_argument("--output", type=Path, help="default: OUTPUT_DIR of the config with the suffix _comparison")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each run (default 1)")
    parser.add_argument("--eval-images", type=int, default=6, help="validation images in the report (default 6)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, make the report of --output again")
    add_data_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs for every run")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments; argparse takes KEY VALUE pairs behind the seeds for seeds."""
    args = argument_parser().parse_args(argv)
    words = args.seeds
    number = next((i for i, word in enumerate(words) if not re.fullmatch(r"-?\d+", word)), len(words))
    args.seeds, behind = [int(word) for word in words[:number]], words[number:]
    if behind and (not args.seeds or len(behind) % 2):
        raise UserError(f"--seeds must be integers, and KEY VALUE pairs may follow; got {' '.join(words)}")
    args.opts = behind + (args.opts[1:] if args.opts[:1] == ["--"] else args.opts)
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the command; ``runner.run_comparison_tool`` reports what it raises."""
    args = parse(argv)
    refuse_launchers("compare.py")
    _check_arguments(args)
    if args.report_only:
        study, settings = _remembered(args.output)
    else:
        study = _study(args)
        settings = _settings(args, study, sys.argv[1:] if argv is None else argv)
    check_pairs(study)
    if study.runs[0].flags:
        _remember(args.output, settings)
        say(f"{len(study.runs)} runs of {study.runs[0].max_iter} iterations, {args.jobs} at once, in {args.output}")
        run_all(study.runs, args.jobs, args.num_gpus)
    check_finished(study.runs)
    check_comparable(study)
    _remember(args.output, settings)
    comparison = compare(study)
    report = write_report(comparison, settings, args.output, args.eval_images)
    results = comparison.results
    write_results(comparison, args.output)
    print(f"\n{metrics_table(results, study.arms)}\n\n{results['verdict']}")
    if results["power"]["sentence"]:
        print(results["power"]["sentence"])
    for note in results["notes"]:
        print(f"note: {note}")
    print(f"\nReport: {report}")


def _check_arguments(args: argparse.Namespace) -> None:
    for name, least in (("jobs", 1), ("num_gpus", 1), ("eval_images", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for_config = args.seeds or args.against or args.opts
    for_folders = args.baseline_runs or args.repr_runs
    if args.config_file:
        right = args.seeds and not for_folders and not args.report_only
    elif args.report_only:
        right = args.output and not for_config and not for_folders
    else:
        right = args.baseline_runs and args.repr_runs and args.output and not for_config
    if not right:
        raise UserError(
            "give --config-file and --seeds (and --against, KEY VALUE), or --baseline-runs, --repr-runs and --output, "
            "or --report-only and --output"
        )


def _study(args: argparse.Namespace) -> Study:
    if args.config_file:
        request = (args.config_file, args.seeds, args.output, args.register, args.opts, args.num_gpus)
        study, args.output = plan_study(*request, evaluations=10, against=args.against)
        return study
    _register(args.register)
    runs = [run_from_folder(folder, BASELINE) for folder in args.baseline_runs]
    runs += [run_from_folder(folder, REPR) for folder in args.repr_runs]
    return Study((BASELINE, REPR), tuple(runs))


def _register(register: list[list[str]]) -> None:
    register_builtin()
    for words in register:
        register_coco_format(*words)


def _settings(args: argparse.Namespace, study: Study, argv: list[str]) -> dict[str, Any]:
    program = sys.argv[0] if sys.argv[0].startswith("repr-det") else "python tools/compare.py"
    runs = []
    for run in study.runs:
        folder = os.path.relpath(run.folder, args.output)
        command = shlex.join(["python", *run.command()[1:]]) if run.flags else ""
        runs.append({"arm": run.arm, "seed": run.seed, "folder": folder, "max_iter": run.max_iter, "command": command})
    settings = {"command": f"{program} {shlex.join(argv)}", "arms": study.arms, "any_config": study.any_config}
    return settings | {"register": args.register, "runs": runs}


def _remember(output: Path, settings: dict[str, Any]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    write_atomically(output / _SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False))


def _remembered(output: Path) -> tuple[Study, dict[str, Any]]:
    path = output / _SETTINGS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {output} holds no comparison")
    settings = {"arms": (BASELINE, REPR), "any_config": False} | read_json(path)  # of 0.2.0, and of this version
    runs = []
    for run in settings["runs"]:
        folder = Path(os.path.normpath(output / run["folder"]))
        runs.append(Run(run["arm"], run["seed"], folder, run["max_iter"]))
    _register(settings["register"])
    return Study(tuple(settings["arms"]), tuple(runs), settings["any_config"]), settings
