"""The method's formulas as the paper writes them, in NumPy."""

import numpy as np


def textbook_overlap(weight: np.ndarray) -> np.ndarray:
    """O_f by equations 1 and 2. weight: (J, d) float64."""
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return np.abs(unit @ unit.T - np.eye(len(unit))).sum(1) / len(unit)
