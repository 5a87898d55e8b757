"""The paper's figure of filters' influence: how much test accuracy the loss of one filter costs, for every filter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar.records import STANDARD
from cifar.report import Record, Settings, arm_name, group, way_name


def draw_influence(
    runs: Sequence[tuple[Settings, Record]], influence: Sequence[tuple[str, dict[str, list[float]]]], file: Path
) -> str:
    """Writes the figure: a row for each way of training, a column for each conv, filters from the most to the least
    needed; a line is the mean over the seeds, its shade their range.

    Returns:
        What was written, in a sentence.
    """
    from matplotlib.figure import Figure

    known = dict(influence)
    groups = group([(settings, record) for settings, record in runs if settings.key in known])
    if not groups:
        return "no weights of finished runs to draw the influence of filters from"
    figure = Figure(figsize=(10, 3 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 3, squeeze=False, sharey=True)
    for row, (way, arms) in zip(panels, groups.items(), strict=True):
        for arm, found in arms.items():
            for number, panel in enumerate(row):
                keys = [Settings(**record["settings"]).key for record in found.values()]
                worth = np.array([sorted(list(known[key].values())[number], reverse=True) for key in keys])
                rank = np.arange(1, worth.shape[1] + 1)
                style = {"color": "black", "linestyle": "--"} if arm.row == STANDARD else {}
                (line,) = panel.plot(rank, worth.mean(0), label=arm_name(arm, arms), **style)
                panel.fill_between(rank, worth.min(0), worth.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
                panel.set_title(f"conv {number + 1}", loc="left")
                panel.set_xlabel("filter, by influence")
        name = f"\n{way_name(way, groups)}" if len(groups) > 1 else ""
        row[0].set_ylabel(f"test accuracy lost, points{name}")
        row[-1].legend(frameon=False)
    figure.savefig(file)
    return f"influence of every filter in {len(known)} networks: {file}"
