"""How a drop and a restore grow with filters and layers: whole backbones, and single layers of 256 to 2048 channels.

The line that they are held against is what their matrix products alone would take (``transitions.needed_flops`` at the
machine's own GEMM rate); the eigen-decompositions of layers without a null space come on top and are timed apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.scheme import RePrScheme
from repr_det.studies.benchmarking.case import Bench, Case
from repr_det.studies.benchmarking.transitions import eigen_seconds, gemm_rate, needed_flops, time_transitions

# Name -> depth, and the keys that make it another network than the plain ResNet of that depth.
NETWORKS: dict[str, tuple[int, str]] = {
    "R18": (18, ""),
    "R50": (50, ""),
    "R101": (101, ""),
    "X101-32x8d": (
        101,
        "MODEL.RESNETS.NUM_GROUPS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.STRIDE_IN_1X1 False",
    ),
    "R50, double width": (50, "MODEL.RESNETS.WIDTH_PER_GROUP 128 MODEL.RESNETS.RES2_OUT_CHANNELS 512"),
}
CHANNELS = (256, 512, 1024, 2048)
KERNELS = (3, 1)


def measure_scale(
    case: Case,
    config_file: str,
    repeats: int,
    report: Callable[[str], None] = print,
    networks: Sequence[str] = tuple(NETWORKS),
    channels: Sequence[int] = CHANNELS,
) -> dict[str, Any]:
    """Drops and restores of ``networks``, and of one conv with as many filters as inputs for each of ``channels``.

    Args:
        case: says share, norm and device; images of 64 px, for what is measured does not depend on them.

    Returns:
        "gemm_flops_per_second"; "networks" and "layers": a list of dicts with "name", "filters", "weights" (of what
        takes part), "flops" (of the products), "eigen" (seconds), "drop" and "restore" (seconds, medians); layers also
        have "channels" and "kernel".
    """
    found: dict[str, Any] = {"gemm_flops_per_second": gemm_rate(case.device), "networks": [], "layers": []}
    for name in networks:
        depth, opts = NETWORKS[name]
        small = replace(case, depth=depth, size=64, width=0, batch=1, heads="small", amp=False)
        with Bench(small, config_file, repr_on=True, opts=opts.split()) as bench:
            for number in range(2):  # layers without a gradient would lose no filter, and there is a momentum to zero
                bench.step(number)
            entry = _measure(bench.hook.scheme, case, repeats)
        found["networks"].append({"name": name, **entry})
        report(f"  {name}: {_in_words(entry)}")
    for kernel in KERNELS:
        for number in channels:
            net = nn.Sequential(nn.Conv2d(number, number, kernel), nn.BatchNorm2d(number)).to(case.device)
            optimizer = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9)
            options = {"drop_ratio": case.ratio, "max_drop_per_layer": case.ratio}
            scheme = RePrScheme(find_filter_layers(net, ["0"]), optimizer, **options)
            net(torch.randn(2, number, kernel, kernel, device=case.device)).sum().backward()
            optimizer.step()
            entry = _measure(scheme, case, repeats)
            name = f"{kernel} x {kernel}, {number} to {number} channels"
            found["layers"].append({"name": name, "channels": number, "kernel": kernel, **entry})
            report(f"  {name}: {_in_words(entry)}")
    return found


def _measure(scheme: RePrScheme, case: Case, repeats: int) -> dict[str, float]:
    layers = scheme.layers
    return {
        "filters": sum(layer.num_filters for layer in layers),
        "weights": sum(layer.weight.numel() for layer in layers),
        "flops": sum(layer_flops(layer, case.ratio) for layer in layers),
        "eigen": eigen_seconds(layers, case.ratio),
        **time_transitions(scheme, repeats, case.device),
    }


def layer_flops(layer: FilterLayer, ratio: float) -> float:
    """Of a drop and a restore; the filters of a grouped conv are a layer of their own in each group."""
    groups = layer.conv.groups
    filters = layer.num_filters // groups
    return groups * sum(needed_flops(filters, round(ratio * filters), layer.weight[0].numel()))


def _in_words(entry: dict[str, Any]) -> str:
    return f"{entry['weights'] / 1e6:.1f} million weights, drop {entry['drop']:.3f} s, restore {entry['restore']:.3f} s"
