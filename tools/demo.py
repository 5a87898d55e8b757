#!/usr/bin/env python
"""Trains baseline and RePr side by side on 75 of the embedded shapes, on the CPU, and prints the COCO AP of both.

tools/demo.py [--fresh] [--jobs N] [KEY VALUE ...]

The runs lie in output/demo. A second call shows what is there, continues what is unfinished, and with --fresh starts
over.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import repr_det.commands  # noqa: F401  (first: it silences warnings of what is imported next)
from repr_det.method.errors import UserError
from repr_det.studies.comparison.command import plan_study
from repr_det.studies.comparison.records import compare, is_finished, metrics_table
from repr_det.studies.comparison.runner import run_all, run_comparison_tool
from repr_det.studies.comparison.statistics import number

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
# Two fifths of the config's iterations; S1 and S2 follow from the first learning-rate step. An evaluation on the way
# would change what comes after it: it draws a random number.
SHORT = ["SOLVER.MAX_ITER", "800", "SOLVER.STEPS", "(600,720)", "TEST.EVAL_PERIOD", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.path.relpath(ROOT / "output" / "demo")))
    parser.add_argument("--fresh", action="store_true", help="delete the runs of an earlier demo and train again")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    if args.fresh:
        for folder in args.output.glob(f"*_seed{SEED}"):
            shutil.rmtree(folder)
    config_file = os.path.relpath(ROOT / "configs" / "demo_r50_fpn.yaml")
    study, _ = plan_study(config_file, [SEED], args.output, opts=[*SHORT, *args.opts])
    iterations = study.runs[0].max_iter
    if all(map(is_finished, study.runs)):
        print(f"Both runs in {args.output} are finished already; --fresh trains them again.")
    else:
        print(f"Training baseline and RePr, {iterations} iterations each: at most 5 minutes on two idle cores.")
        run_all(study.runs, args.jobs)
    results = compare(study).results
    difference = number(results["metrics"]["AP"]["difference"]["mean"], sign=True)
    program = os.path.relpath(sys.executable), os.path.relpath(ROOT / "tools" / "compare.py")
    print(
        f"\nCOCO box AP on the validation images after {iterations} iterations, seed {SEED}\n\n"
        f"{metrics_table(results, study.arms)}\n\n"
        f"One pair of runs cannot tell an effect of RePr, here {difference} AP, from chance. Three seeds of the whole "
        "config, with an interval:\n\n"
        f"  {' '.join(program)} --config-file {config_file} --seeds 1 2 3 --jobs {args.jobs}\n"
    )
    for note in results["notes"][1:]:  # the first one says the same
        print(f"note: {note}")


if __name__ == "__main__":
    run_comparison_tool(main)
