"""tools/benchmark.py: which cases to measure, and what of each."""

import argparse
import dataclasses
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from repr_det.method.errors import UserError
from repr_det.method.schedule import RePrSchedule
from repr_det.studies.benchmarking.case import DEPTHS, HEADS, NORMS, Case, stock_step
from repr_det.studies.benchmarking.memory import measure_memory
from repr_det.studies.benchmarking.prediction import predict, run_ratio
from repr_det.studies.benchmarking.report import machine, table, write
from repr_det.studies.benchmarking.scale import measure_scale
from repr_det.studies.benchmarking.steps import S1, SLIM, measure_steps
from repr_det.studies.benchmarking.transitions import measure_transitions
from repr_det.studies.benchmarking.whole_run import SHORTEST, measure_run

PARTS = ("steps", "transitions", "memory", "run", "scale")
CONFIG_FILE = str(Path(__file__).resolve().parents[3] / "configs" / "baseline_r50_fpn.yaml")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cases, the parts of each, and how often."""

    cases: list[Case]
    parts: tuple[str, ...]
    pairs: int
    repeats: int
    run_iters: int
    config_file: str
    output: str


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What RePr costs and saves beside stock Detectron2, on synthetic batches: step times, transitions, "
        "FLOPs, memory, a whole run. Every combination of depths, ratios, sizes and batches is a case. With --device "
        "cuda sizes, batches and heads are by default those of a GPU that trains the stock config."
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[50], metavar="D", help=f"of {DEPTHS} (50)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3], metavar="P", help="dropped share (0.3)")
    parser.add_argument("--sizes", nargs="+", metavar="PX", help="320 or 800x1333: of the images (320; cuda: stock)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="images in a step (4; cuda: stock)")
    parser.add_argument("--heads", help=f"{' or '.join(HEADS)} (small; cuda: stock)")
    parser.add_argument("--norm", default="FrozenBN", help=f"of {', '.join(NORMS)} (FrozenBN, which freezes res2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--amp", action="store_true", help="mixed precision, on a GPU")
    parser.add_argument("--pairs", type=int, default=30, help="rounds of one step of every arm (30)")
    parser.add_argument("--repeats", type=int, default=3, help="drops and restores (3)")
    parser.add_argument("--run-iters", type=int, default=180, help="iterations of the whole run of each arm (180)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 takes its default")
    parser.add_argument(
        "--only", nargs="+", default=list(PARTS[:-1]), metavar="PART", help=f"of {', '.join(PARTS)} (all but scale)"
    )
    parser.add_argument("--config-file", default=CONFIG_FILE, help="configs/baseline_r50_fpn.yaml")
    parser.add_argument("--output", default="output/benchmark", help="folder for json, table and plot")
    return parser


def plan(arguments: Sequence[str] | None = None) -> Plan:
    """The plan of a command line.

    Raises:
        UserError: a value is out of range.
    """
    given = argument_parser().parse_args(arguments)
    for part in given.only:
        if part not in PARTS:
            raise UserError(f"--only must be of {', '.join(PARTS)}, got {part!r}")
    for flag in ("pairs", "repeats"):
        if getattr(given, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(given, flag)}")
    if given.run_iters < SHORTEST:
        raise UserError(f"--run-iters must be at least {SHORTEST}, got {given.run_iters}")
    if given.threads < 0:
        raise UserError(f"--threads must be at least 0, got {given.threads}")
    if os.path.exists(given.output) and not os.path.isdir(given.output):
        raise UserError(f"--output {given.output!r} is a file, not a folder")
    if given.threads:
        torch.set_num_threads(given.threads)
    gpu = given.device != "cpu"
    batch, stock = stock_step(given.config_file) if gpu else (4, (320, 0))
    sizes = [stock] if given.sizes is None else [_size(text) for text in given.sizes]
    heads = given.heads or ("stock" if gpu else "small")
    cases = [
        Case(depth, ratio, height, batch, heads, given.norm, given.device, given.amp, width)
        for depth, ratio, (height, width), batch in itertools.product(
            given.depths, given.ratios, sizes, given.batches or [batch]
        )
    ]
    parts = tuple(part for part in PARTS if part in given.only)
    return Plan(cases, parts, given.pairs, given.repeats, given.run_iters, given.config_file, given.output)


def _size(text: str) -> tuple[int, int]:
    """Height and width of "800x1333"; width 0 of "320"."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--sizes must be a side or HEIGHTxWIDTH, such as 320 or 800x1333, got {text!r}")
    return int(sides[0]), int(sides[1]) if len(sides) == 2 else 0


def measure(case: Case, chosen: Plan) -> dict[str, Any]:
    """The parts of one case, and the predictions where steps and transitions are among them."""
    found: dict[str, Any] = {"name": case.name, "case": dataclasses.asdict(case)}
    if "steps" in chosen.parts:
        found["steps"] = measure_steps(case, chosen.config_file, chosen.pairs)
    if "transitions" in chosen.parts:
        found["transitions"] = measure_transitions(case, chosen.config_file, chosen.repeats)
    if "memory" in chosen.parts:
        found["memory"] = measure_memory(case, chosen.config_file)
    if "run" in chosen.parts:
        found["run"] = measure_run(case, chosen.config_file, chosen.run_iters)
    if "steps" in found and "transitions" in found:
        steps, transitions = found["steps"], found["transitions"]
        # Without noise S1 is the baseline and what the hook does; the difference of two medians would be mostly noise.
        full = 1 + steps["hook"][S1]["share"]
        both = transitions["drop"] + transitions["restore"]
        if transitions["calibrated"] is not None:
            both = max(both, transitions["calibrated"])
        sub, both = steps["ratio"][SLIM]["median"], both / transitions["step"]
        found["prediction"] = predict(full, sub, both)
        found["prediction"]["flops"] = predict(1.0, steps["flops"]["step_exact_ratio"], 0.0)
        if "run" in found:
            run = found["run"]
            schedule = RePrSchedule(run["s1_iters"], run["s2_iters"], run["cycles"])
            run["predicted"] = run_ratio(run["iterations"], schedule, full, sub, both)
            run["steps_predicted"] = run_ratio(run["iterations"], schedule, full, sub)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes json, table and plot after every case."""
    warnings.filterwarnings("ignore")
    chosen = plan(arguments)
    results: dict[str, Any] = {"machine": machine(), "pairs": chosen.pairs, "cases": []}
    if "scale" in chosen.parts:
        results["scale"] = measure_scale(chosen.cases[0], chosen.config_file, chosen.repeats)
        write(results, chosen.output)
    for case in chosen.cases if chosen.parts != ("scale",) else ():
        print(case.name, flush=True)
        results["cases"].append(measure(case, chosen))
        write(results, chosen.output)
    print("\n" + table(results), end="")
    print(f"written to {chosen.output}")
