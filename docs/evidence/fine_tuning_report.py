#!/usr/bin/env python
"""The table of the fine-tuning search: every arm beside the baseline of the same data, iterations, rate and noise.

docs/evidence/fine_tuning_report.py [fine_tuning_search.jsonl] [--average ema]

An arm with a removal (REPR or a cycle) is compared, paired by seed, with the arm without one whose description is the
same otherwise. --average takes the AP of an averaged model in both arms.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

from repr_det.studies.comparison.statistics import Difference, paired_difference, summarize

Run = dict[str, Any]
Arms = dict[str, dict[int, float]]  # name -> seed -> AP


def setting_of(run: Run) -> str:
    """What an arm has in common with its baseline, as text."""
    own = ("name", "seed", "cycle", "dropout", "average", "cfg")
    shared = {key: value for key, value in run.items() if key not in own}
    cfg = {key: value for key, value in run.get("cfg", {}).items() if not key.startswith("REPR.")}
    return json.dumps({"data": "raccoon", "iterations": 800} | shared | {"cfg": cfg}, sort_keys=True)


def removes(run: Run) -> bool:
    return "cycle" in run or "dropout" in run or bool(run.get("cfg", {}).get("REPR.ENABLED"))


def read(file: Path, average: str | None) -> tuple[dict[str, Arms], dict[str, Arms]]:
    """Baselines and arms with a removal: setting -> name -> seed -> AP."""
    baselines: dict[str, Arms] = {}
    forms: dict[str, Arms] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        run = found["run"]
        values = found if average is None else found.get("average", {}).get(average)
        if values is None:
            continue
        arms = (forms if removes(run) else baselines).setdefault(setting_of(run), {})
        arms.setdefault(run["name"], {})[run["seed"]] = values["AP"]
    return baselines, forms


def difference(baseline: Arms, form: dict[int, float]) -> Difference | None:
    """Form minus baseline over the seeds that both have; None without any."""
    all_seeds = {seed: ap for arm in baseline.values() for seed, ap in arm.items()}
    seeds = sorted(set(all_seeds) & set(form))
    return paired_difference([all_seeds[s] for s in seeds], [form[s] for s in seeds]) if seeds else None


def lines(baselines: dict[str, Arms], forms: dict[str, Arms]) -> list[tuple[str, ...]]:
    found = []
    for setting in sorted(set(baselines) | set(forms), key=_order):
        for name, arm in sorted(baselines.get(setting, {}).items()):
            found.append((_told(setting), f"**{name}**", str(len(arm)), _spread(arm), ""))
        for name, arm in sorted(forms.get(setting, {}).items()):
            d = difference(baselines.get(setting, {}), arm)
            found.append((_told(setting), name, str(len(arm)), _spread(arm), _interval(d)))
    return found


def _order(setting: str) -> tuple[str, int, str]:
    values = json.loads(setting)
    return values["data"], values["iterations"], setting


def _told(setting: str) -> str:
    values = json.loads(setting)
    parts = [values.pop("data"), f"{values.pop('iterations')}"]
    cfg = values.pop("cfg")
    parts += [f"{key.split('.')[-1]} {value}" for key, value in cfg.items()]
    return ", ".join([*parts, *(f"{key} {value}" for key, value in values.items())])


def _spread(arm: dict[int, float]) -> str:
    found = summarize(list(arm.values()))
    return f"{found.mean:.1f}" + (f" ± {found.sd:.1f}" if found.n > 1 else "")


def _interval(d: Difference | None) -> str:
    if d is None:
        return "no baseline of these seeds"
    if not math.isfinite(d.low):
        return f"{d.mean:+.1f} (one pair)"
    return f"{d.mean:+.1f} ({d.low:+.1f} .. {d.high:+.1f}, {d.n} pairs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path(__file__).with_name("fine_tuning_search.jsonl"), help="JSON lines"
    )
    parser.add_argument("--average", help="take the AP of this average of the weights instead of the last weights'")
    args = parser.parse_args()
    header = ("data, iterations, setting", "arm", "runs", "AP", "arm - baseline (95 % CI)")
    print(tabulate(lines(*read(args.results, args.average)), header, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
