"""Inter-filter orthogonality (RePr, section 4) and the directions that a returning filter takes (section 3).

Shape shorthand:
    J: filters of a layer        d: weights of one filter, C_in / groups * kh * kw
    K: filters that were kept    M: filters that were dropped    n = K + M

Pure tensor functions; weights may have any trailing shape, rows are filters. A row that is zero or not finite has no
direction: it overlaps with nothing (O_f = 0), nothing has to be orthogonal to it, and no function here returns NaN.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

# Squared singular values of the unit-row matrix below this are the null space: cosines of at most 1e-6. Rounding in
# double precision leaves up to the second, relative to the largest, where the exact value is 0.
_NULL_EIGENVALUE = 1e-12
_NULL_ROUNDING = 1e-14
# Eigenvalues closer than this, relative to themselves, count as one eigenspace: rounding of single-precision weights.
_SAME_EIGENVALUE = 3e-6
# The squares of filters whose norm lies between this and its inverse are summed in single precision without loss.
_SQUARES_IN_RANGE = 1e-12
# Rows of a Gram matrix computed at once: only one side of the diagonal, so half the work where J is much larger.
_BLOCK = 256
# What the single-precision route must reach, or the next slower one is taken.
_ACCEPTED_COSINE = 3e-6


def unit_filters(weight: Tensor) -> Tensor:
    """Every filter scaled to unit L2 norm.

    Args:
        weight: (J, ...), any floating type.

    Returns:
        (J, d) in float32 (float64 stays); rows that are zero or not finite become zero.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point tensor (J, ...), got {weight.dtype} {tuple(weight.shape)}")
    rows = weight.detach().flatten(1)
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if ((norms > _SQUARES_IN_RANGE) & (norms < 1 / _SQUARES_IN_RANGE)).all():
        return rows / norms
    # Scaling by the largest entry first keeps the squares of tiny or huge weights in range.
    largest = rows.abs().amax(1, keepdim=True)
    usable = torch.isfinite(largest) & (largest > 0)
    rows = torch.where(usable, rows / torch.where(usable, largest, 1), 0)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1)


def inter_filter_orthogonality(weight: Tensor, groups: int = 1) -> Tensor:
    """O_f of the paper (eq. 1 and 2): P = |What What^T - I|, O_f = sum of row f of P / J.

    Args:
        weight: (J, ...) filters of one layer.
        groups: of a grouped conv; filters of different groups look at different channels, so each group is a layer of
            its own with J / groups filters.

    Returns:
        (J,) in [0, 1); the largest overlaps most with its neighbours and is dropped first.
    """
    return by_group(lambda part: overlap_of_unit_rows(unit_filters(part)), groups, weight)


def by_group(function: Callable[..., Tensor], groups: int, *tensors: Tensor) -> Tensor:
    """``function`` of the rows (J / groups, ...) of ``tensors`` that belong to each group, joined again."""
    if groups == 1:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(t.chunk(groups) for t in tensors), strict=True)])


def overlap_of_unit_rows(unit: Tensor) -> Tensor:
    """``inter_filter_orthogonality`` of filters that are given as their ``unit_filters`` (J, d)."""
    total = unit.new_zeros(len(unit))
    with torch.autocast(unit.device.type, enabled=False):
        for first in range(0, len(unit), _BLOCK):
            block = unit[first : first + _BLOCK] @ unit[first:].T
            # The diagonal of P is zero by definition, also where rounding leaves |f|^2 a little off 1.
            block.fill_diagonal_(0).abs_()
            total[first : first + _BLOCK] += block.sum(1)
            total[first + _BLOCK :] += block[:, _BLOCK:].sum(0)
    return total / len(unit)


def overlap_of_kept(weight: Tensor, overlap: Tensor, dropped: Tensor, groups: int = 1) -> Tensor:
    """O_f of the filters that stay, among themselves, from that of all: what the dropped ones contributed is taken off.

    Args:
        weight: (J, ...) filters of one layer before the drop.
        overlap: (J,) their ``inter_filter_orthogonality``.
        dropped: (J,) bool, not all True.
        groups: of a grouped conv.

    Returns:
        (K,), the same as ``inter_filter_orthogonality(weight[~dropped])`` of each group up to rounding, at less than
        half the cost.
    """
    return by_group(_overlap_of_kept, groups, weight, overlap, dropped)


def _overlap_of_kept(weight: Tensor, overlap: Tensor, dropped: Tensor) -> Tensor:
    unit = unit_filters(weight)
    kept = ~dropped
    with torch.autocast(unit.device.type, enabled=False):
        with_dropped = (unit[kept] @ unit[dropped].T).abs_().sum(1)
    return ((overlap[kept] * len(unit) - with_dropped) / kept.sum()).clamp_min(0)


def overlap_with_returned(overlap_kept: Tensor, new: Tensor, cosines: Tensor, returned: Tensor) -> Tensor:
    """O_f of all filters after the dropped ones have returned, from that of the kept ones and their cosines to the new.

    Args:
        overlap_kept: (K,) ``inter_filter_orthogonality`` of the kept filters.
        new: (M, ...) the filters that returned.
        cosines: (K, M) of kept to new filters, of either sign.
        returned: (K + M,) bool, True where the layer's filter is a new one.

    Returns:
        (K + M,), the same as ``inter_filter_orthogonality`` of the whole layer up to rounding.
    """
    number_kept, number_new = cosines.shape
    size = cosines.abs()
    total = overlap_kept.new_empty(len(returned))
    total[~returned] = overlap_kept * number_kept + size.sum(1)
    total[returned] = inter_filter_orthogonality(new) * number_new + size.sum(0)
    return total / len(returned)


def expected_overlap(num_filters: int, dimension: int) -> float:
    """O_f of random directions: (J - 1) / J * E|cos|, E|cos| = Gamma(d / 2) / (sqrt(pi) Gamma((d + 1) / 2)).

    Args:
        num_filters: J.
        dimension: d.
    """
    mean_cosine = math.exp(math.lgamma(dimension / 2) - math.lgamma((dimension + 1) / 2)) / math.sqrt(math.pi)
    return (num_filters - 1) / num_filters * mean_cosine


def least_overlap_filters(kept: Tensor, dropped: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Directions for M returning filters with the least overlap with the kept and with their own old values.

    With A (n, d) the unit rows of both arguments, the new rows are orthonormal and span the eigenvectors of the M
    smallest eigenvalues of A^T A, so the sum of their squared cosines to A is minimal; where a null space of dimension
    >= M exists (section 3 of the paper) they lie in it. Inside an eigenspace the directions are uniformly random. Where
    M > d they are floor(M / d) randomly rotated orthonormal bases and the remainder from the smallest eigenvalues.

    Cost O(d n^2); nothing d x d is factorised where d > n + M.

    Args:
        kept: (K, ...) current values of the filters that stayed; K may be 0.
        dropped: (M, ...) values of the dropped filters before the drop, same trailing shape.
        generator: source of the random directions, on any device; None takes torch's default one.

    Returns:
        (M, ...) unit rows with dtype and device of ``dropped``.

    Raises:
        ValueError: the trailing shapes differ.
    """
    if kept.shape[1:] != dropped.shape[1:]:
        raise ValueError(f"kept and dropped filters differ in shape: {tuple(kept.shape)}, {tuple(dropped.shape)}")
    num_new = len(dropped)
    if num_new == 0:
        return dropped.clone()
    rows = unit_filters(torch.cat([kept.to(dropped), dropped]))
    new = least_overlap_rows(rows, num_new, generator)[0]
    return new.to(dropped).reshape(dropped.shape)


def least_overlap_rows(
    rows: Tensor, num_new: int, generator: torch.Generator | None = None, num_kept: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``least_overlap_filters`` for kept and dropped filters together, given as their ``unit_filters`` (n, d).

    Args:
        num_new: at least 1.
        num_kept: how many of the first rows are kept filters.

    Returns:
        new unit rows (num_new, d); the cosines of ``rows`` to them (n, num_new); and O_f of the kept filters among
        themselves (num_kept,), by the matrix products that were needed anyway where there is a null space.
    """
    dimension = rows.shape[1]
    with torch.autocast(rows.device.type, enabled=False):
        if len(rows) + num_new <= dimension:
            gram = _lower_gram(rows)
            overlap = _overlap_of_lower_gram(gram[:num_kept, :num_kept])
            new, cosines = _null_space_rows(rows, gram, num_new, generator)
            return new, cosines, overlap
        blocks = [_random_rotation(dimension, rows, generator) for _ in range(num_new // dimension)]
        if num_new % dimension:
            blocks.append(_smallest_eigenvectors(rows.double(), num_new % dimension, generator).to(rows))
        new = torch.cat(blocks)
        return new, rows @ new.T, overlap_of_unit_rows(rows[:num_kept])


def _overlap_of_lower_gram(gram: Tensor) -> Tensor:
    """``overlap_of_unit_rows`` from their Gram matrix, of which only what is below the diagonal is read."""
    size = gram.tril(-1).abs_()
    return (size.sum(1) + size.sum(0)) / max(len(gram), 1)


def _randn(rows: int, columns: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(rows, columns, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _random_rotation(size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Haar-distributed orthogonal (size, size)."""
    q, r = torch.linalg.qr(_randn(size, size, like, generator))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)


def _null_space_rows(
    rows: Tensor, gram: Tensor, num_new: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(num_new, d) random orthonormal rows orthogonal to ``rows`` (n, d) with ``_lower_gram`` ``gram``, n + num_new <=
    d; and what is left of their cosines, (n, num_new)."""
    found = _project_by_cholesky(rows, gram, _randn(num_new, rows.shape[1], rows, generator))
    if found is None:
        # Not QR: for dependent rows it adds directions of its own choice, and the new rows would avoid those too.
        new = _smallest_eigenvectors(rows.double(), num_new, generator).to(rows)
        found = new, rows @ new.T
    return found


def _project_by_cholesky(rows: Tensor, gram: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
    """``new`` made orthogonal to ``rows`` and orthonormal by Gram matrices, with the cosines that are left; or None
    where that is not accurate."""
    gram, info = torch.linalg.cholesky_ex(gram)
    if info.item() != 0:
        return None
    cosines = rows @ new.T
    for _ in range(2):  # a second pass removes what the conditioning of the first left over
        new = new - torch.cholesky_solve(cosines, gram).T @ rows
        own, info = torch.linalg.cholesky_ex(new @ new.T)
        if info.item() != 0:
            return None
        # By the inverse: half the time of a triangular solve with many columns, and what it loses the check would see.
        new = torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=False) @ new
        cosines = rows @ new.T
        if _is_accurate(cosines, new @ new.T):
            return new, cosines
    return None


def _lower_gram(rows: Tensor) -> Tensor:
    """rows @ rows.T (n, n) in blocks up to the diagonal, which is all that a Cholesky factorisation reads."""
    gram = rows.new_zeros(len(rows), len(rows))
    for first in range(0, len(rows), _BLOCK):
        last = first + _BLOCK
        gram[first:last, :last] = rows[first:last] @ rows[:last].T
    return gram


def _is_accurate(cosines: Tensor, own: Tensor) -> bool:
    """Whether cosines (n, M) to other rows are 0 and those among the new rows the identity; False for NaN."""
    own.diagonal().sub_(1)
    return bool((cosines.abs().max() <= _ACCEPTED_COSINE) & (own.abs().max() <= _ACCEPTED_COSINE))


def _smallest_eigenvectors(rows: Tensor, num_new: int, generator: torch.Generator | None) -> Tensor:
    """(num_new, d) orthonormal rows that span the smallest eigenvalues of rows^T rows, random inside eigenspaces."""
    count, dimension = rows.shape
    if count >= dimension:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        null_size = int((values <= _null_threshold(values)).sum())
        vectors = vectors.T
    else:
        # From the smaller Gram matrix: the row space by its eigenvectors, the null space as what is orthogonal to it.
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        rank = int((values > _null_threshold(values)).sum())
        row_space = torch.linalg.qr(rows.T @ vectors[:, count - rank :])[0]
        null_size = min(dimension - rank, num_new)
        null = _randn(dimension, null_size, rows, generator)
        for _ in range(2):
            null = torch.linalg.qr(null - row_space @ (row_space.T @ null))[0]
        values = torch.cat([values.new_zeros(null_size), values[count - rank :]])
        vectors = torch.cat([null.T, row_space.T])
    spaces = [
        (first, last) for first, last in itertools.pairwise(_eigenspaces(values.tolist(), null_size)) if first < num_new
    ]
    vectors = vectors[: spaces[-1][1]]
    # In one dimension a rotation is a sign.
    vectors = vectors * torch.where(_randn(len(vectors), 1, vectors, generator) < 0, -1.0, 1.0).to(vectors)
    for first, last in spaces:
        if last - first > 1:
            vectors[first:last] = _random_rotation(last - first, vectors, generator) @ vectors[first:last]
    return vectors[:num_new]


def _null_threshold(values: Tensor) -> float:
    return max(_NULL_EIGENVALUE, _NULL_ROUNDING * values[-1].item())


def _eigenspaces(values: list[float], null_size: int) -> list[int]:
    """Edges of the runs of equal ascending eigenvalues; the null space is one, whatever comes close to it."""
    edges = [0]
    for i in range(null_size, len(values)):
        if i == null_size or values[i] > values[edges[-1]] * (1 + _SAME_EIGENVALUE):
            edges.append(i)
    # A null space of dimension 0 has no edge of its own.
    return [*(edges if null_size else edges[1:]), len(values)]
