"""The plots of the report, each a function from the comparison to an <svg> element."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from repr_det.studies.comparison.matches import METRICS
from repr_det.studies.comparison.overlaps import Moment
from repr_det.studies.comparison.plotting import colour, new_figure, style, to_svg
from repr_det.studies.comparison.results import RunData
from repr_det.studies.comparison.runs import ARM_NAMES, BASELINE, REPR
from repr_det.studies.comparison.timing import PHASES, sub_network_phases

Pairs = Sequence[tuple[RunData, RunData]]
_ARMS = (BASELINE, REPR)
# The one colour that pixels carry, which no CSS variable can change: --repr of the page, the same on light and dark.
_REPR_RGB = to_rgba("#d5622a")[:3]
_MAP_PIXELS = 256


def curves(pairs: Pairs) -> str:
    """Training loss and validation AP over iterations, thin lines a seed each, thick their mean."""
    with style():
        panels: list[tuple[str, Callable[[RunData], list[tuple[int, float]]]]] = [
            ("training loss (median of 20 iterations)", lambda one: one.losses)
        ]
        if any(len(one.curve) > 1 for pair in pairs for one in pair):
            panels.append(("validation AP", lambda one: one.curve))
        figure = new_figure(2.6 * len(panels) + 0.3)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (title, points) in zip(axes, panels, strict=True):
            ax.set_title(title)
            ax.grid(axis="y")
            for start, stop in sub_network_phases(pairs[0][1].events, pairs[0][1].run.max_iter):
                ax.axvspan(start, stop, color=colour("shade"), linewidth=0)
            for number, arm in enumerate(_ARMS):
                _draw_seeds(ax, [points(pair[number]) for pair in pairs], colour(arm))
            ax.margins(x=0.01)
        axes[-1].set_xlabel("iterations")
        _limit_to_data(axes[0], [value for pair in pairs for one in pair for _, value in one.losses])
        handles = [Line2D([], [], color=colour(arm), linewidth=2, label=ARM_NAMES[arm]) for arm in _ARMS]
        handles.append(Patch(color=colour("shade"), label="sub-network trains (RePr)"))
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        return to_svg(figure, "curves", "Training loss and validation AP of both arms over iterations")


def differences(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The paired difference of every metric: a dot a seed, the mean with its interval."""
    with style():
        figure = new_figure(2.5)
        ax = figure.subplots()
        ax.axhline(0, color=colour("muted"), linewidth=0.8)
        for x, metric in enumerate(METRICS):
            difference = metrics[metric]["difference"]
            values = [v for v in difference["values"] if math.isfinite(v)]
            if not values:
                ax.annotate("n/a", (x, 0), ha="center", va="bottom", color=colour("muted"))
                continue
            ax.plot([x - 0.12] * len(values), values, "o", color=colour("muted"), markersize=4, markeredgewidth=0)
            if math.isfinite(difference["low"]):
                ax.plot([x + 0.08] * 2, [difference["low"], difference["high"]], color=colour("repr"), linewidth=1.6)
            ax.plot([x + 0.08], [difference["mean"]], "D", color=colour("repr"), markersize=5, markeredgewidth=0)
        ax.set_xticks(range(len(METRICS)), METRICS)
        ax.tick_params(axis="x", length=0)
        ax.set_xlim(-0.5, len(METRICS) - 0.5)
        ax.set_ylabel("RePr minus baseline")
        ax.grid(axis="y")
        handles = [
            Line2D([], [], color=colour("muted"), marker="o", linestyle="", markersize=4, label="one seed"),
            Line2D([], [], color=colour("repr"), marker="D", markersize=5, label="mean and 95 % interval over seeds"),
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2)
        return to_svg(figure, "differences", "Paired difference of every metric by seed")


def on_off_map(one: RunData, counts: Mapping[str, int]) -> str:
    """Layers down, cycles across; a mark where a filter was dropped, filters of a layer from left to right."""
    drops = [event for event in one.events if event["event"] == "drop"]
    with style():
        figure = new_figure(0.55 + 0.17 * len(counts))
        axes = figure.subplots(1, len(drops), sharey=True, squeeze=False)[0]
        for ax, event in zip(axes, drops, strict=True):
            pixels = np.zeros((len(counts), _MAP_PIXELS, 4))
            pixels[..., :3] = _REPR_RGB
            for row, (layer, filters) in enumerate(counts.items()):
                off = np.zeros(filters)
                off[event["dropped"].get(layer, [])] = 1
                pixels[row, :, 3] = _resampled(off, _MAP_PIXELS)
            ax.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, 1, len(counts) - 0.5, -0.5))
            ax.set_title(f"cycle {event['cycle'] + 1}, after iteration {event['iteration']}")
            ax.set_xticks([])
            ax.set_yticks(range(len(counts)), _short(counts))
            ax.hlines(np.arange(len(counts) - 1) + 0.5, 0, 1, color=colour("rule"), linewidth=0.5)
            ax.tick_params(axis="y", length=0)
            for side in ("top", "right", "bottom", "left"):
                ax.spines[side].set_visible(True)
                ax.spines[side].set_color(colour("rule"))
        return to_svg(figure, "onoff", "Which filters were dropped in each cycle, by layer")


def dropped_share(pairs: Pairs, counts: Mapping[str, int]) -> str:
    """The share of each layer that every drop took: mean over the seeds, and their range."""
    cycles = sorted({event["cycle"] for _, other in pairs for event in other.events if event["event"] == "drop"})
    shares = {
        cycle: np.array(
            [
                [100 * len(event["dropped"].get(layer, [])) / filters for layer, filters in counts.items()]
                for _, other in pairs
                for event in other.events
                if event["event"] == "drop" and event["cycle"] == cycle
            ]
        )
        for cycle in cycles
    }
    with style():
        figure = new_figure(0.7 + 0.19 * len(counts))
        ax = figure.subplots()
        rows = np.arange(len(counts))
        for cycle in cycles:
            offset = 0.22 * (cycle - (len(cycles) - 1) / 2)
            alpha = 0.45 + 0.55 * (cycle + 1) / len(cycles)
            ax.hlines(
                rows + offset,
                shares[cycle].min(axis=0),
                shares[cycle].max(axis=0),
                color=colour("repr"),
                linewidth=1.2,
                alpha=alpha,
            )
            ax.plot(
                shares[cycle].mean(axis=0),
                rows + offset,
                marker=("o", "s", "^", "D", "v")[cycle % 5],
                linestyle="",
                color=colour("repr"),
                alpha=alpha,
                markersize=3.6,
                markeredgewidth=0,
                label=f"cycle {cycle + 1}",
            )
        ax.set_yticks(rows, _short(counts))
        ax.set_ylim(len(counts) - 0.5, -0.5)
        ax.set_xlim(left=-1)
        ax.set_xlabel("dropped share of the layer (%)")
        ax.grid()
        figure.legend(loc="outside upper right", ncols=len(cycles))
        return to_svg(figure, "share", "Dropped share of every layer in each cycle")


def overlap_distributions(layers: Sequence[str], moments: Sequence[Moment]) -> str:
    """O_f by layer: bar from the 5th to the 95th percentile, thick from the 25th to the 75th, dot the median."""
    with style():
        figure = new_figure(0.75 + 0.21 * len(layers))
        axes = figure.subplots(1, len(moments), sharey=True, sharex=True, squeeze=False)[0]
        for ax, moment in zip(axes, moments, strict=True):
            alone = len(moment.arms) == 1
            for arm, overlaps in moment.arms.items():
                both = alone and moment.title == "before the first drop"
                shade = colour("both") if both else colour(arm)
                offset = 0.0 if alone else (-0.18 if arm == BASELINE else 0.18)
                for row, layer in enumerate(layers):
                    if layer in overlaps:
                        _draw_quantiles(ax, row + offset, overlaps[layer], shade)
            ax.set_title(moment.title)
            ax.set_yticks(range(len(layers)), _short(layers))
            ax.set_ylim(len(layers) - 0.5, -0.5)
            ax.grid()
            ax.xaxis.set_major_locator(MaxNLocator(4))
        axes[len(axes) // 2].set_xlabel("O_f, mean |cosine| to the other filters of the layer")
        handles = [Line2D([], [], color=colour(arm), linewidth=2.4, label=ARM_NAMES[arm]) for arm in _ARMS]
        if moments[0].title == "before the first drop":
            handles.append(Line2D([], [], color=colour("both"), linewidth=2.4, label="both (the same network)"))
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        return to_svg(figure, "overlap", "Distribution of inter-filter orthogonality by layer")


def wall_clock(times: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time of an average run went, one bar an arm."""
    with style():
        figure = new_figure(1.75)
        ax = figure.subplots()
        largest = max(sum(seconds.values()) for seconds in times.values())
        unit, name = (3600, "hours") if largest > 7200 else (60, "minutes") if largest > 120 else (1, "seconds")
        for row, arm in enumerate(_ARMS):
            left = 0.0
            for phase in PHASES:
                width = times[arm][phase] / unit
                ax.barh(row, width, left=left, height=0.62, color=colour(f"phase-{phase}"))
                left += width
        ax.set_yticks(range(len(_ARMS)), [ARM_NAMES[arm] for arm in _ARMS])
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.set_xlabel(f"{name} a run, mean over the seeds")
        handles = [Patch(color=colour(f"phase-{phase}"), label=text) for phase, text in PHASES.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7.5)
        return to_svg(figure, "time", "Wall-clock time by phase")


def _draw_seeds(ax: Axes, seeds: list[list[tuple[int, float]]], shade: str) -> None:
    for points in seeds:
        if points:
            ax.plot(*zip(*points, strict=True), color=shade, linewidth=0.7, alpha=0.55 if len(seeds) > 1 else 1)
    common = sorted(set.intersection(*(set(dict(points)) for points in seeds)))
    if common:
        mean = [np.mean([dict(points)[x] for points in seeds]) for x in common]
        marker = "o" if len(common) <= 30 else ""
        ax.plot(common, mean, color=shade, linewidth=1.8, marker=marker, markersize=2.6)


def _limit_to_data(ax: Axes, losses: list[float]) -> None:
    """The first losses may be many times the rest, which would flatten the curve."""
    there = [loss for loss in losses if math.isfinite(loss)]
    if len(there) > 20:
        high = 1.3 * float(np.percentile(there, 97))
        if max(there) > 1.5 * high:
            ax.set_ylim(top=high)
    ax.set_ylim(bottom=0)


def _draw_quantiles(ax: Axes, row: float, values: np.ndarray, shade: str) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, first, middle, third, high = np.percentile(values, [5, 25, 50, 75, 95])
    ax.plot([low, high], [row, row], color=shade, linewidth=0.9, solid_capstyle="butt")
    ax.plot([first, third], [row, row], color=shade, linewidth=2.8, solid_capstyle="butt")
    ax.plot([middle], [row], marker="|", color=colour("ink"), markersize=4.5, markeredgewidth=1.1)


def _resampled(values: np.ndarray, pixels: int) -> np.ndarray:
    """(J,) -> (pixels,): every pixel the mean of the filters that it covers."""
    fine = np.repeat(values, pixels)  # J parts of a pixel each
    return fine.reshape(pixels, len(values)).mean(axis=1)


def _short(layers: Iterable[str]) -> list[str]:
    """Layer names without the modules that all of them share."""
    parts = [name.split(".") for name in layers]
    shared = len(os.path.commonprefix([p[:-1] for p in parts])) if len(parts) > 1 else 0  # noqa: RUF071 (of lists)
    return [".".join(p[shared:]) for p in parts]
