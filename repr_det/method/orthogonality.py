"""Inter-filter orthogonality (RePr, section 4) and the directions of returning filters (section 3).

J filters of a layer, K of them kept, M dropped; d = C_in / groups * kh * kw weights each. Float64 on the CPU: one seed
gives the same filters on every device. A row that is zero or not finite has no direction and overlaps with nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_NULL_EIGENVALUE = 1e-12  # the null space: cosines of at most 1e-6
_NULL_ROUNDING = 1e-14  # and what rounding leaves of 0, relative to the largest
_SAME_EIGENVALUE = 3e-6  # relative difference inside one eigenspace: float32 rounding of weights


def unit_filters(weight: Tensor) -> Tensor:
    """(J, ...) -> (J, d) of unit L2 norm; rows without a direction become zero."""
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point tensor (J, ...), got {weight.dtype} {tuple(weight.shape)}")
    rows = weight.detach().cpu().double().flatten(1)
    # Divided by the largest entry first, else squares of tiny or huge weights leave the range.
    largest = rows.abs().amax(1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    rows = torch.where(usable, rows / torch.where(usable, largest, 1), 0)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1)


def inter_filter_orthogonality(weight: Tensor, groups: int = 1) -> Tensor:
    """O_f of the paper (eq. 1 and 2): P = |What What^T - I|, O_f = sum of row f of P / J.

    Args:
        weight: (J, ...) filters of one layer.
        groups: of a grouped conv; each counts as a layer.

    Returns:
        (J,) in [0, 1), float64 on the CPU; the largest is dropped first.

    Example:
        >>> import torch
        >>> from repr_det import inter_filter_orthogonality
        >>> inter_filter_orthogonality(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]))
        tensor([0.2357, 0.2357, 0.4714], dtype=torch.float64)
    """
    return by_group(_overlap, groups, weight)


def _overlap(weight: Tensor) -> Tensor:
    unit = unit_filters(weight)
    return (unit @ unit.T).fill_diagonal_(0).abs_().sum(1) / len(unit)


def by_group(function: Callable[..., Tensor], groups: int, *tensors: Tensor) -> Tensor:
    """``function`` of the rows of each group, joined again."""
    if groups == 1:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(t.chunk(groups) for t in tensors), strict=True)])


def overlap_of_kept(weight: Tensor, dropped: Tensor, groups: int = 1) -> Tensor:
    """O_f of the filters that stay, among themselves (K,); ``dropped`` is (J,) bool, not all True."""
    return by_group(lambda part, out: _overlap(part[~out]), groups, weight, dropped)


def expected_overlap(num_filters: int, dimension: int) -> float:
    """O_f of random directions: (J - 1) / J * E|cos|, E|cos| = Gamma(d / 2) / (sqrt(pi) Gamma((d + 1) / 2))."""
    mean_cosine = math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)
    return (num_filters - 1) / num_filters * mean_cosine


def least_overlap_filters(kept: Tensor, dropped: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Directions for M returning filters of least overlap with the kept and their own old values.

    With A (K + M, d) the unit rows of both arguments, the new rows are orthonormal and span the eigenvectors of the M
    smallest eigenvalues of A^T A: the null space if it has M dimensions (section 3 of the paper). Inside an eigenspace
    they are uniformly random. If M > d they are floor(M / d) random bases and the rest from the smallest eigenvalues.

    Args:
        kept: (K, ...) values; K may be 0.
        dropped: (M, ...) values before the drop.
        generator: of the CPU; None takes torch's default one.

    Returns:
        (M, ...) unit rows with dtype and device of ``dropped``.

    Raises:
        ValueError: the trailing shapes differ.

    Example:
        >>> import torch
        >>> from repr_det import least_overlap_filters
        >>> kept, dropped = torch.eye(4)[:2], torch.eye(4)[2:3]
        >>> least_overlap_filters(kept, dropped).abs()  # the one direction that is left
        tensor([[0., 0., 0., 1.]])
    """
    if kept.shape[1:] != dropped.shape[1:]:
        raise ValueError(f"kept and dropped filters differ in shape: {tuple(kept.shape)}, {tuple(dropped.shape)}")
    if not len(dropped):
        return dropped.clone()
    rows = torch.cat([unit_filters(kept), unit_filters(dropped)])
    dimension, num_new = rows.shape[1], len(dropped)
    blocks = [_random_rotation(dimension, generator) for _ in range(num_new // dimension)]
    if num_new % dimension:
        blocks.append(_smallest_eigenvectors(rows, num_new % dimension, generator))
    return torch.cat(blocks).to(dropped).reshape(dropped.shape)


def _randn(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float64)


def _random_rotation(size: int, generator: torch.Generator | None) -> Tensor:
    """Haar-distributed orthogonal (size, size)."""
    q, r = torch.linalg.qr(_randn(size, size, generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _smallest_eigenvectors(rows: Tensor, num_new: int, generator: torch.Generator | None) -> Tensor:
    """(num_new, d) orthonormal, of rows^T rows."""
    count, dimension = rows.shape
    values, vectors = torch.linalg.eigh(rows.T @ rows if count >= dimension else rows @ rows.T)
    vectors = vectors.T
    null_size = int((values <= max(_NULL_EIGENVALUE, _NULL_ROUNDING * values[-1].item())).sum())
    if count < dimension:
        # The smaller Gram matrix gives the row space, and what is orthogonal to it is the null space.
        values = values[null_size:]
        row_space = torch.linalg.qr(rows.T @ vectors[null_size:].T)[0]
        null_size = min(dimension - len(values), num_new)
        null = _randn(dimension, null_size, generator)
        for _ in range(2):
            null = torch.linalg.qr(null - row_space @ (row_space.T @ null))[0]
        values = torch.cat([values.new_zeros(null_size), values])
        vectors = torch.cat([null.T, row_space.T])
    spaces = [(first, last) for first, last in _eigenspaces(values.tolist(), null_size) if first < num_new]
    vectors = vectors[: spaces[-1][1]]
    # In one dimension a rotation is a sign.
    vectors = vectors * torch.where(_randn(len(vectors), 1, generator) < 0, -1.0, 1.0)
    for first, last in spaces:
        if last - first > 1:
            vectors[first:last] = _random_rotation(last - first, generator) @ vectors[first:last]
    return vectors[:num_new]


def _eigenspaces(values: list[float], null_size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the runs of equal ascending eigenvalues; the null space is one."""
    first = [0] if null_size else []
    for i in range(null_size, len(values)):
        if i == null_size or values[i] > values[first[-1]] * (1 + _SAME_EIGENVALUE):
            first.append(i)
    return itertools.pairwise([*first, len(values)])
