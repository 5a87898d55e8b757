#!/usr/bin/env python
"""Trains baseline and RePr side by side on 75 of the embedded shapes, on the CPU, and prints the COCO AP of both.

tools/demo.py [--fresh] [--jobs N] [KEY VALUE ...]

The runs lie in output/demo. A second call shows what is there, continues what is unfinished, and with --fresh starts
over.
"""

import argparse
import shutil
from pathlib import Path

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det.method.errors import UserError
from repr_det.studies.comparison.plan import plan_study
from repr_det.studies.comparison.runner import RunFailed, available_cores, run_all, run_comparison_tool
from repr_det.studies.comparison.runs import Study, is_finished
from repr_det.studies.comparison.table import metric_rows, metrics_table, read_run, tidy_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default=_relative(ROOT / "configs" / "demo_r50_fpn.yaml"))
    parser.add_argument("--output", type=Path, default=_relative(ROOT / "output" / "demo"))
    parser.add_argument("--fresh", action="store_true", help="delete the runs of an earlier demo and train again")
    parser.add_argument("--jobs", type=int, default=min(2, available_cores()), help="runs at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs")
    args = parser.parse_args()
    study = _plan(args)
    if all(map(is_finished, study.runs)):
        print(f"Both runs in {args.output} are finished already; tools/demo.py --fresh trains them again.")
    else:
        print(f"Training baseline and RePr on {args.config_file}, {study.runs[0].max_iter} iterations each.")
        run_all(study.runs, args.jobs)
    _show(study, args.output)


def _plan(args: argparse.Namespace) -> Study:
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    if args.fresh:
        for arm in ("baseline", "repr"):
            shutil.rmtree(args.output / arm, ignore_errors=True)
    try:
        return plan_study(args.config_file, [args.seed], args.output, opts=args.opts)[0]
    except UserError as error:
        if "holds a run with" in str(error):  # the config has changed since
            raise UserError(f"{error} (--fresh does that here)") from error
        raise


def _show(study: Study, output: Path) -> None:
    metrics = metric_rows(tidy_table(map(read_run, study.runs)), study.arms, study.seeds)
    print(f"\nBox AP on the validation images after {study.runs[0].max_iter} iterations, seed {study.seeds[0]}\n")
    print(metrics_table(metrics))
    missing = [run.name for run in study.runs if not metrics["AP"][run.arm]["n"]]
    if missing:
        raise RunFailed(f"{' and '.join(missing)} ended without a finite AP: no object was detected")
    folders = ", ".join(str(run.folder) for run in study.runs)
    print(
        "\nOne seed proves nothing: the same config with another seed moves AP by as much as this difference may be.\n"
        "tools/compare.py --seeds 1 2 3 trains several and tells the difference from chance.\n"
        f"\nRuns: {folders} (log.txt, metrics.json, model_final.pth) in {output}"
    )


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    run_comparison_tool(main)
