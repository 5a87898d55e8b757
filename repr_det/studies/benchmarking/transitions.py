"""Time of a drop and a restore, beside the textbook route and the time that its matrix products alone would take."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch

from repr_det.method.layers import FilterLayer
from repr_det.method.scheme import RePrScheme
from repr_det.method.slim_choice import seconds_of
from repr_det.studies.benchmarking.case import Bench, Case


def textbook_overlap(weight: np.ndarray) -> np.ndarray:
    """O_f as equations 1 and 2 read. weight: (J, d) float64."""
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return np.abs(unit @ unit.T - np.eye(len(unit))).sum(1) / len(unit)


def textbook_filters(kept: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """(M, d) new filters from the null space that a full pivoted QR of all old ones gives, its last columns first.

    Where that null space has fewer than M dimensions the directions repeat.
    """
    q = scipy.linalg.qr(np.concatenate([kept, dropped]).T, mode="full", pivoting=True)[0]
    return q[:, -1 - np.arange(len(dropped)) % q.shape[1]].T


def textbook_seconds(layers: Sequence[FilterLayer], ratio: float) -> tuple[float, float]:
    """Seconds of a drop (metric of every layer) and a restore (QR of every layer) in NumPy and SciPy, float64, CPU."""
    weights = [x.weight.detach().flatten(1).double().cpu().numpy() for x in layers]
    start = time.perf_counter()
    orders = [np.argsort(textbook_overlap(w)) for w in weights]
    middle = time.perf_counter()
    for weight, order in zip(weights, orders, strict=True):
        kept = len(weight) - round(ratio * len(weight))
        textbook_filters(weight[order[:kept]], weight[order[kept:]])
    return middle - start, time.perf_counter() - middle


def needed_flops(num_filters: int, num_dropped: int, dimension: int) -> tuple[int, int]:
    """Floating-point operations of the matrix products that a layer needs: (drop, restore).

    Drop: the Gram matrix of the metric, 2 J^2 d. Restore with a null space: the Gram matrix of kept and old filters,
    2 J^2 d, and two projections (the second re-orthogonalises) of 4 J M d each with the Gram matrix of the new filters,
    2 M^2 d. Without: A^T A, 2 J d^2; the factorisation that follows is not counted.
    """
    metric = 2 * num_filters**2 * dimension
    if num_filters + num_dropped > dimension:
        return metric, 2 * num_filters * dimension**2
    projection = 4 * num_filters * num_dropped * dimension + 2 * num_dropped**2 * dimension
    return metric, metric + 2 * projection


def gemm_rate(device: str, size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations a second of a square single-precision matrix product, the best of ``repeats``."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(repeats))


def eigen_seconds(layers: Sequence[FilterLayer], ratio: float) -> float:
    """Seconds of the eigen-decompositions, d x d in double precision, of the layers that have no null space (of each
    group of a grouped conv)."""
    seconds = 0.0
    for layer in layers:
        dimension, filters = layer.weight[0].numel(), layer.num_filters // layer.conv.groups
        dropped = round(ratio * filters)
        if filters + dropped > dimension and dropped % dimension:
            rows = torch.randn(filters, dimension, device=layer.weight.device, dtype=torch.float64)
            gram = rows.T @ rows
            seconds += layer.conv.groups * seconds_of(lambda gram=gram: torch.linalg.eigh(gram), layer.weight.device)
    return seconds


def measure_transitions(
    case: Case, config_file: str, repeats: int, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Drop and restore of the whole network, without the calibration passes of FrozenBN, which are timed apart.

    Returns:
        seconds (medians): "drop", "restore", "step" of stock Detectron2, "textbook_drop", "textbook_restore",
        "limit_drop", "limit_restore" (``needed_flops`` at ``gemm_rate``), "limit_eigen" (``eigen_seconds``),
        "calibrated" (drop and restore with the calibration of FrozenBN, None for other norms);
        "gemm_flops_per_second"; "weights": their number; "calibration_batches": their number.
    """
    with Bench(case, config_file, repr_on=True) as bench:
        scheme, layers = bench.hook.scheme, bench.hook.scheme.layers
        step = statistics.median(seconds_of(lambda: bench.step(0), case.device) for _ in range(4))
        found = {"step": step, **time_transitions(scheme, repeats, case.device)}
        report(f"  drop {found['drop']:.3f} s, restore {found['restore']:.3f} s, step {step:.3f} s")
        found["calibrated"] = _calibrated_seconds(bench) if case.norm == "FrozenBN" else None
        found["calibration_batches"] = scheme.calibration_batches
        rate = gemm_rate(case.device)
        flops = [needed_flops(x.num_filters, round(case.ratio * x.num_filters), x.weight[0].numel()) for x in layers]
        found["gemm_flops_per_second"] = rate
        found["limit_drop"], found["limit_restore"] = (sum(column) / rate for column in zip(*flops, strict=True))
        found["limit_eigen"] = eigen_seconds(layers, case.ratio)
        found["textbook_drop"], found["textbook_restore"] = textbook_seconds(layers, case.ratio)
        report(f"  textbook: drop {found['textbook_drop']:.1f} s, restore {found['textbook_restore']:.1f} s")
        found["weights"] = sum(x.weight.numel() for x in layers)
    return found


def time_transitions(scheme: RePrScheme, repeats: int, device: str) -> dict[str, float]:
    """Medians of ``repeats`` drops and restores, after one that is not counted."""
    drops, restores = [], []
    for _ in range(repeats + 1):
        drops.append(seconds_of(scheme.drop, device))
        restores.append(seconds_of(scheme.restore, device))
    return {"drop": statistics.median(drops[1:]), "restore": statistics.median(restores[1:])}


def _calibrated_seconds(bench: Bench) -> float:
    scheme = RePrScheme(
        bench.hook.scheme.layers,
        bench.trainer.optimizer,
        drop_ratio=bench.case.ratio,
        max_drop_per_layer=bench.case.ratio,
        calibration_batches=bench.hook.scheme.calibration_batches,
        passes=bench.passes(),
    )
    return seconds_of(scheme.drop, bench.case.device) + seconds_of(scheme.restore, bench.case.device)
