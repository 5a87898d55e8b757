#!/usr/bin/env python
"""The tables of the fine-tuning search: every arm beside the baseline of the same data, iterations, rate and noise.

docs/evidence/fine_tuning_report.py [fine_tuning_search.jsonl] [--average ema]

An arm with a removal (REPR or a cycle) is compared, paired by seed, with the arm without one whose description is the
same otherwise. --average takes the AP of an averaged model in both arms.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from telling import interval, markdown, paired, spread

from repr_det.studies.comparison.statistics import Difference

RESULTS = Path(__file__).with_name("fine_tuning_search.jsonl")
# Run of the search -> what it does, for the method card.
FORMS = {
    "b_lr04": "baseline",
    "f4_base": "baseline, fp32",
    "b4_heads": "only FPN and RPN convs, the layers that are new",
    "b4_hearly": "the same, cycles in the first 180 iterations",
    "b4_old": "backbone, 30 % of every conv, filters come back as they were",
    "b4_recycle": "backbone, the 10 % of conv1 and conv2 that matter least (Taylor), `function_preserving`",
    "b4_fcnew": "the box head's fully connected layers restarted twice (after RIFLE)",
    "b4_small5": "backbone, 5 % at most 10 % of a layer, `ortho_calibrated`",
    "f4_distill_pub": "as published, distilled from the network before each drop; fp32, against the same without RePr",
    "f4_redundant": "near-duplicates and dead filters only (`redundant`, `function_preserving`); fp32",
    "f5_redundant_no3": "the same only in conv1 and conv2; fp32",
    "f5_redundant_no3_6c": "the same in six cycles; fp32",
    "f5_redundant_no3_warm": "the same in three, with a new warm-up after each restore (`repr_*_redundant.yaml`); fp32",
    "b4_pub": "backbone, as published",
    "b4_pub_warm": "the same with a new warm-up after each restore",
    "b4_pub_old": "the same as `b4_pub`, but the filters come back as they were",
    "b_bkdrop_step": "at 0.01: 10 % of conv1 and conv2 left out, others in every step",
    "b_fcdrop_step": "at 0.01: 30 % of the box head left out, others in every step",
    "b_pub": "at 0.01: as published",
}
# The same for docs/results.md: run, first seed that counts, data and iterations, form.
SUMMARY = [
    ("b4_pub", 1, "BCCD, 800", "as published"),
    ("b4_pub_warm", 1, "", "as published, a new warm-up after each restore"),
    ("b4_heads", 1, "", "only FPN and RPN convs"),
    ("b4_pub_old", 1, "", "as published, but filters come back as they were"),
    ("f5_redundant_no3_warm", 1, "", "`repr_r50_fpn_redundant.yaml`"),
    ("f5_redundant_no3_warm", 4, "", "the same, seeds that had no part in finding it"),
    ("r_pub", 1, "raccoons, 800", "as published"),
    ("r_redundant_no3_warm", 1, "", "`repr_r50_fpn_redundant.yaml`"),
    ("b24_pub", 1, "BCCD, 2,400", "as published"),
    ("r24_pub", 1, "raccoons, 2,400", "as published"),
]

Run = dict[str, Any]
Arms = dict[str, dict[int, float]]  # name -> seed -> AP


def setting_of(run: Run) -> str:
    """Everything that an arm has in common with its baseline, as text."""
    own = ("name", "seed", "cycle", "old", "average", "cfg")
    shared = {key: value for key, value in run.items() if key not in own}
    cfg = {key: value for key, value in run.get("cfg", {}).items() if not key.startswith("REPR.")}
    return json.dumps({"data": "raccoon", "iterations": 800} | shared | {"cfg": cfg}, sort_keys=True)


def removes(run: Run) -> bool:
    return "cycle" in run or bool(run.get("cfg", {}).get("REPR.ENABLED"))


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
    return paired(all_seeds, form)


def lines(baselines: dict[str, Arms], forms: dict[str, Arms]) -> list[tuple[str, ...]]:
    found = []
    for setting in sorted(set(baselines) | set(forms), key=_order):
        for name, arm in sorted(baselines.get(setting, {}).items()):
            found.append((_label(setting), f"**{name}**", str(len(arm)), spread(arm.values()), ""))
        for name, arm in sorted(forms.get(setting, {}).items()):
            d = difference(baselines.get(setting, {}), arm)
            found.append((_label(setting), name, str(len(arm)), spread(arm.values()), interval(d)))
    return found


def _order(setting: str) -> tuple[str, int, str]:
    values = json.loads(setting)
    return values["data"], values["iterations"], setting


def _label(setting: str) -> str:
    values = json.loads(setting)
    parts = [values.pop("data"), f"{values.pop('iterations')}"]
    cfg = values.pop("cfg")
    parts += [f"{key.split('.')[-1]} {value}" for key, value in cfg.items()]
    return ", ".join([*parts, *(f"{key} {value}" for key, value in values.items())])


def table(file: Path = RESULTS, average: str | None = None) -> str:
    """Every arm, a line each; bold: without a removal."""
    header = ("data, iterations, setting", "arm", "runs", "AP", "arm - baseline (95 % CI)")
    return markdown(header, lines(*read(file, average)))


def forms(file: Path = RESULTS) -> str:
    """The arms of FORMS in words."""
    label = {name.strip("*"): values for _, name, *values in lines(*read(file, None))}
    return markdown(
        ("run", "form, BCCD, rate 0.04, 800 iterations", "seeds", "AP", "form - baseline (95 % CI)"),
        [[f"`{name}`", words, *label[name]] for name, words in FORMS.items()],
    )


def summary(file: Path = RESULTS) -> str:
    """The arms of SUMMARY."""
    baselines, forms = read(file, None)
    arms = {name: (baselines[setting], arm) for setting, named in forms.items() for name, arm in named.items()}
    rows = []
    for name, first, *words in SUMMARY:
        baseline, arm = arms[name]
        counted = {seed: ap for seed, ap in arm.items() if seed >= first}
        rows.append([*words, spread(counted.values()), interval(difference(baseline, counted))])
    return markdown(("data, iterations", "form", "AP", "RePr - baseline (95 % CI)"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="JSON lines")
    parser.add_argument("--average", help="take the AP of this average of the weights instead of the last weights'")
    args = parser.parse_args()
    print(table(args.results, args.average))


if __name__ == "__main__":
    main()
