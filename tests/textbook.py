"""The method's formulas as the paper writes them, in NumPy."""

import numpy as np
import torch


def textbook_overlap(weight: torch.Tensor, groups: int = 1) -> np.ndarray:
    """O_f by equations 1 and 2, pair by pair in float64; a row that has no direction overlaps with none."""
    found = []
    for part in np.split(weight.detach().double().flatten(1).numpy(), groups):
        usable = np.isfinite(part).all(1) & (np.abs(part).max(1, initial=0) > 0)
        total = np.zeros(len(part))
        for i in usable.nonzero()[0]:
            for j in usable.nonzero()[0]:
                a, b = (part[k] / np.abs(part[k]).max() for k in (i, j))
                total[i] += (i != j) * abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) / len(part)
        found.append(total)
    return np.concatenate(found)
