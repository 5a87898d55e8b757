#!/usr/bin/env python
"""Draws docs/pictures/overlap.svg: the overlap of the filters in use over training, plainly and with RePr.

docs/pictures/overlap.py        # a minute on a CPU; needs the extra `studies`

The paper's C3(32) on 500 images of scikit-learn's digits (docs/evidence/digits.py), five seeds, 60 epochs. The band
is from the smallest to the largest of them.
"""

import runpy
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from repr_det import RePr, RePrSchedule, find_filter_layers
from repr_det.method.criteria import calibrated_overlap

HERE = Path(__file__).parent
EXAMPLE = runpy.run_path(str(HERE.parent / "evidence" / "digits.py"))
EPOCHS, SEEDS = 60, range(5)


def overlap_in_use(model: torch.nn.Module, one: RePr | None) -> float:
    """Mean over all filters that are not dropped of O_f, in units of what random directions give."""
    found = []
    for layer in find_filter_layers(model, ["*"]):
        mask = one.scheme.masks.get(layer.name) if one is not None else None
        found.append(calibrated_overlap(layer.weight.detach() if mask is None else layer.weight.detach()[~mask]))
    return torch.cat(found).mean().item()


def course(seed: int, use_repr: bool) -> list[float]:
    """The overlap after every epoch, the first value before training."""
    training, _, _ = EXAMPLE["digits"](500)
    torch.manual_seed(seed)
    model = EXAMPLE["c3_32"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    steps = EPOCHS * 10
    one = RePr(model, optimizer, steps, schedule=schedule(), seed=seed) if use_repr else None
    found = [overlap_in_use(model, None)]
    for _ in range(EPOCHS):
        for images, classes in EXAMPLE["batches_of"](training, torch.randperm(len(training[0]))):
            loss = F.cross_entropy(model(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if one is not None:
                one.step()
        found.append(overlap_in_use(model, one))
    return found


def schedule() -> RePrSchedule:
    return RePrSchedule(120, 60, 3)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "overlap"  # the same file again
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for number, drop in enumerate(schedule().drop_iters):
        label = "sub-network: 30 % of the filters dropped" if number == 0 else None
        axes.axvspan((drop + 1) / 10, (drop + 61) / 10, color="#dddddd", lw=0, label=label)
    for use_repr, colour, label in ((False, "#777777", "plain training"), (True, "#c44e00", "RePr")):
        courses = torch.tensor([course(seed, use_repr) for seed in SEEDS])
        axes.fill_between(range(EPOCHS + 1), courses.amin(0), courses.amax(0), color=colour, alpha=0.2, lw=0)
        axes.plot(courses.mean(0), color=colour, label=label)
        print(label, [round(x, 3) for x in courses.mean(0)[:: EPOCHS // 6].tolist()])
    axes.set(xlabel="epoch", ylabel="overlap of filters in use\n(random directions: 1)", xlim=(0, EPOCHS))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(HERE / "overlap.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
