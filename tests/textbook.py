"""The method's formulas as the paper writes them, in NumPy."""

import numpy as np
import torch


def unit_rows(*weights: torch.Tensor) -> np.ndarray:
    """(J, d) float64 rows of norm 1; those without a direction are zero."""
    rows = np.concatenate([weight.detach().double().flatten(1).numpy() for weight in weights])
    largest = np.abs(rows).max(1, keepdims=True, initial=0)
    usable = np.isfinite(largest) & (largest > 0)
    rows = np.where(usable, rows, 0) / np.where(usable, largest, 1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1)


def textbook_overlap(weight: torch.Tensor, groups: int = 1) -> np.ndarray:
    """O_f by equations 1 and 2, pair by pair; a row that has no direction overlaps with none."""
    found = []
    for part in np.split(unit_rows(weight), groups):
        found += [sum(abs(row @ part[j]) for j in range(len(part)) if j != i) / len(part) for i, row in enumerate(part)]
    return np.array(found)
