"""Benchmark results as a table, a json file and a plot."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from repr_det.studies.benchmarking.prediction import SCHEDULES
from repr_det.studies.benchmarking.steps import ARMS, MASKED, S1, SLIM, STOCK

RESULTS, TABLE, PLOT, SCALE_PLOT = "benchmark.json", "benchmark.txt", "benchmark", "scale"


def machine() -> dict[str, Any]:
    """Processor, threads, GPU and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(results: dict[str, Any]) -> str:
    """Everything that was measured, one block a case."""
    where = results["machine"]
    lines = [
        f"{where['gpu'] or where['processor']}, {where['threads']} threads of {where['cores']} cores "
        f"({where['instructions']}), torch {where['torch']}, load at the start {where['load'][0]}"
    ]
    if "scale" in results:
        lines += ["", "drop and restore by size", *(f"  {line}" for line in _scale_lines(results["scale"]))]
    for entry in results["cases"]:
        lines += ["", entry["name"]]
        for part, write in (
            ("steps", _step_lines),
            ("transitions", _transition_lines),
            ("memory", _memory_lines),
            ("prediction", _prediction_lines),
            ("run", _run_lines),
        ):
            if part in entry:
                lines += [f"  {line}" for line in write(entry[part])]
    return "\n".join(lines) + "\n"


def _step_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{'':12}{'median s':>10}{'quartiles':>18}{'to stock':>10}{'quartiles':>16}{'in the hook':>14}"]
    for arm in ARMS:
        seconds, ratio, hook = found["seconds"][arm], found["ratio"].get(arm), found["hook"].get(arm)
        line = f"{arm:12}{seconds['median']:10.4f}{seconds['q1']:9.4f}-{seconds['q3']:.4f}  "
        if ratio:
            line += f"{ratio['median']:10.3f}{ratio['q1']:9.3f}-{ratio['q3']:.3f}"
        if hook:
            line += f"{100 * hook['share']:12.3f} %"
        lines.append(line)
    flops = found["flops"]
    lines.append(
        f"FLOPs of S2, {found['dropped']} of {found['filters']} filters dropped: forward (fvcore) "
        f"{flops['forward_exact_ratio']:.3f}, forward and backward {flops['step_exact_ratio']:.3f} of dense; "
        f"computed with fill-up {flops['forward_slim_ratio']:.3f}, {flops['step_slim_ratio']:.3f}"
    )
    for scope, what in (("forward", "forward"), ("step", "forward and backward")):
        ratio = found["ratio"][SLIM]["median"] / flops[f"{scope}_exact_ratio"]
        lines.append(f"time ratio of S2 slim over its FLOP ratio ({what}): {ratio:.3f}")
    return lines


def _transition_lines(found: dict[str, Any]) -> list[str]:
    both = found["drop"] + found["restore"]
    textbook = found["textbook_drop"] + found["textbook_restore"]
    limit = found["limit_drop"] + found["limit_restore"]
    lines = [f"{'':12}{'RePr s':>10}{'textbook s':>12}{'GEMM limit s':>14}"]
    for event in ("drop", "restore"):
        lines.append(f"{event:12}{found[event]:10.3f}{found[f'textbook_{event}']:12.2f}{found[f'limit_{event}']:14.3f}")
    lines.append(
        f"drop + restore {both:.3f} s: {textbook / both:.1f} times faster than the textbook, {both / limit:.2f} x the "
        f"GEMM limit ({found['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s), {both / (limit + found['limit_eigen']):.2f} "
        f"x with its eigen-decompositions, {both / found['step']:.2f} of a step ({found['step']:.3f} s); "
        f"{found['weights'] / 1e6:.1f} million weights"
    )
    if found["calibrated"] is not None:
        batches, extra = found["calibration_batches"], found["calibrated"] - both
        lines.append(
            f"calibration of FrozenBN, {batches} batches each time: {extra:.2f} s, {extra / found['step']:.2f} steps"
        )
    return lines


def _scale_lines(found: dict[str, Any]) -> list[str]:
    rate = found["gemm_flops_per_second"]
    lines = [
        f"{'':32}{'filters':>9}{'weights':>10}{'drop s':>9}{'restore s':>11}{'GEMM s':>9}{'eigen s':>9}{'to both':>9}"
        f"   ({rate / 1e9:.0f} GFLOP/s)"
    ]
    for entry in found["networks"] + found["layers"]:
        limit, both = entry["flops"] / rate, entry["drop"] + entry["restore"]
        lines.append(
            f"{entry['name']:32}{entry['filters']:9}{entry['weights'] / 1e6:9.1f}M{entry['drop']:9.3f}"
            f"{entry['restore']:11.3f}{limit:9.3f}{entry['eigen']:9.3f}{both / (limit + entry['eigen']):9.2f}"
        )
    return lines


def _memory_lines(found: dict[str, Any]) -> list[str]:
    peaks = [f"{arm} {found['bytes'][arm] / 2**20:.0f} MiB" for arm in ARMS]
    ratios = [f"{arm} {found['ratio'][arm]:.3f}" for arm in ARMS[1:]]
    return [f"peak memory: {', '.join(peaks)}; to stock: {', '.join(ratios)}"]


def _prediction_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"a whole RePr run on {name} takes {found[name]:.3f} of the baseline's time (its FLOPs: "
        f"{found['flops'][name]:.3f})"
        for name in SCHEDULES
    ]


def _run_lines(found: dict[str, Any]) -> list[str]:
    def predicted(key: str) -> str:
        return f" (predicted {found[key]:.3f})" if key in found else ""

    schedule = f"S1 {found['s1_iters']}, S2 {found['s2_iters']}, {found['cycles']} cycles"
    return [
        f"a run of {found['iterations']} iterations, {schedule}: RePr {found['repr']:.1f} s, of it "
        f"{found['transitions']:.1f} s transitions, stock {found['stock']:.1f} s",
        f"  to stock {found['ratio']:.3f}{predicted('predicted')}; without transitions {found['steps_ratio']:.3f} +- "
        f"{found['error']:.3f}{predicted('steps_predicted')}; at 90,000 iterations, transitions included: "
        f"{found['1x']:.3f}",
    ]


def write(results: dict[str, Any], folder: str) -> None:
    """The json file, the table and the plots of what was measured (SVG and PNG)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    (Path(folder) / TABLE).write_text(table(results))
    if any("steps" in entry or "transitions" in entry for entry in results["cases"]):
        _plot(results, Path(folder))
    if "scale" in results:
        _plot_scale(results["scale"], Path(folder))


def _plot(results: dict[str, Any], folder: Path) -> None:
    steps = [(e["name"], e["steps"]) for e in results["cases"] if "steps" in e]
    transitions = [(e["name"], e["transitions"]) for e in results["cases"] if "transitions" in e]
    figure, axes = _panels(3, 17, 1.8 + 0.75 * max(len(steps), len(transitions), 3))
    _bars(
        axes[0],
        steps,
        {
            arm: lambda found, arm=arm: found["seconds"][arm]["median"] / found["seconds"][STOCK]["median"]
            for arm in (S1, MASKED, SLIM)
        },
        "step time, stock Detectron2 = 1",
    )
    axes[0].axvline(1, color="black", linewidth=0.8)
    for name, found in steps:
        ratio, flops = found["ratio"][SLIM], found["flops"]["step_exact_ratio"]
        error = [[max(0, ratio["median"] - ratio["q1"])], [max(0, ratio["q3"] - ratio["median"])]]
        axes[1].errorbar(flops, ratio["median"], yerr=error, fmt="o", label=name)
    low = min([0.5, *(found["flops"]["step_exact_ratio"] for _, found in steps)])
    axes[1].plot([low, 1], [low, 1], color="black", linewidth=0.8, label="time = FLOPs")
    axes[1].plot([low, 1], [1.05 * low, 1.05], color="black", linewidth=0.8, linestyle=":", label="1.05 x FLOPs")
    axes[1].set_xlabel("FLOPs of a slim step, dense = 1")
    axes[1].set_ylabel("time of a slim step, stock = 1 (quartiles)")
    axes[1].legend(fontsize=7)
    _bars(
        axes[2],
        transitions,
        {
            "textbook": lambda found: found["textbook_drop"] + found["textbook_restore"],
            "RePr": lambda found: found["drop"] + found["restore"],
            "GEMM limit": lambda found: found["limit_drop"] + found["limit_restore"],
            "one step": lambda found: found["step"],
        },
        "drop + restore, s",
    )
    if transitions:
        axes[2].set_xscale("log")
    _save(figure, folder / PLOT)


def _plot_scale(found: dict[str, Any], folder: Path) -> None:
    """Seconds of drop and restore against operations for networks, against channels for layers; lines: the products
    alone, and with the eigen-decompositions."""
    rate = found["gemm_flops_per_second"]
    figure, (left, right) = _panels(2, 12, 4.8)
    flops = sorted(entry["flops"] for entry in found["networks"])
    ends = [flops[0] / 5e9, flops[-1] * 2 / 1e9]
    left.plot(ends, [x * 1e9 / rate for x in ends], color="black", linewidth=0.8, label="matrix products alone")
    for entry in found["networks"]:
        x, both = entry["flops"] / 1e9, entry["drop"] + entry["restore"]
        (point,) = left.plot(x, both, "o")
        left.plot(x, x * 1e9 / rate + entry["eigen"], "_", color=point.get_color(), markersize=12)
        text = f"{entry['name']}\n{entry['filters']:,} filters, {entry['weights'] / 1e6:.0f} M weights"
        left.annotate(text, (x, both), (-9, 2), textcoords="offset points", fontsize=7, ha="right")
    left.plot([], [], "o", color="grey", label="drop + restore, measured")
    left.plot([], [], "_", color="grey", markersize=12, label="matrix products and eigen-decompositions")
    left.set_xlabel("operations of the matrix products, G")
    for kernel in sorted({entry["kernel"] for entry in found["layers"]}, reverse=True):
        chosen = [entry for entry in found["layers"] if entry["kernel"] == kernel]
        channels = [entry["channels"] for entry in chosen]
        (line,) = right.plot(
            channels, [e["drop"] + e["restore"] for e in chosen], "o-", label=f"{kernel} x {kernel} conv, measured"
        )
        # Both grow with the third power of the channels: the line goes on to 4096.
        model = [e["flops"] / rate + e["eigen"] for e in chosen]
        factor = 4096 / channels[-1]
        right.plot(
            [*channels, 4096], [*model, model[-1] * factor**3], "--", color=line.get_color(), linewidth=0.8,
            label="its matrix products" + (" and eigen-decomposition" if chosen[0]["eigen"] else ""),
        )  # fmt: skip
    right.set_xlabel("channels in and out of one layer")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylabel("s")
        axis.grid(linewidth=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=7, loc="lower right")
    left.margins(y=0.12)
    left.xaxis.set_major_formatter("{x:g}")
    right.set_xticks([256, 512, 1024, 2048, 4096], ["256", "512", "1024", "2048", "4096"])
    right.minorticks_off()
    _save(figure, folder / SCALE_PLOT)


def _panels(number: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, number, figsize=(width, height))


def _save(figure: Any, path: Path) -> None:
    """As SVG and PNG."""
    from matplotlib import pyplot

    figure.tight_layout()
    for suffix in ("svg", "png"):
        figure.savefig(path.with_suffix(f".{suffix}"), dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, entries: list, bars: dict[str, Any], label: str) -> None:
    height = 0.8 / len(bars)
    for number, (name, value) in enumerate(bars.items()):
        positions = [-i - number * height for i in range(len(entries))]
        axis.barh(positions, [value(found) for _, found in entries], height, label=name)
    axis.set_yticks([-i - 0.4 + height / 2 for i in range(len(entries))], [name for name, _ in entries], fontsize=7)
    axis.set_xlabel(label)
    if entries:
        axis.legend(fontsize=7)
