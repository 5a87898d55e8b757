"""The directions of returning filters against numpy.linalg."""

import numpy as np
import pytest
import torch
from test_orthogonality import generator, overlap_by_hand, randn

from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters

COSINE = 1e-5  # what repr-method.md asks of a null space


def bases(count: int, dimension: int, seed: int) -> np.ndarray:
    """(count * dimension, dimension) float64: stacked orthonormal bases, A^T A = count * I."""
    rng = np.random.default_rng(seed)
    return np.concatenate([np.linalg.qr(rng.standard_normal((dimension, dimension)))[0] for _ in range(count)])


def unit_rows(*weights: torch.Tensor) -> np.ndarray:
    """(n, d) float64 unit rows; rows without a direction are left out."""
    rows = np.concatenate([w.detach().double().flatten(1).numpy() for w in weights])
    rows = rows[np.isfinite(rows).all(1)]
    rows = rows / np.maximum(np.abs(rows).max(1, keepdims=True, initial=0), 1e-300)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1))[norms[:, 0] > 0]


def objective(new: torch.Tensor, others: np.ndarray) -> float:
    return float(((others @ new.double().flatten(1).numpy().T) ** 2).sum())


def assert_orthonormal(new: torch.Tensor, atol: float = 1e-5) -> None:
    rows = new.double().flatten(1).numpy()
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=atol)


def assert_null(new: torch.Tensor, *others: torch.Tensor) -> None:
    assert_orthonormal(new)
    cosines = np.abs(unit_rows(*others) @ new.double().flatten(1).numpy().T)
    assert cosines.max(initial=0) <= COSINE


def subspace_distance(a: torch.Tensor, b: np.ndarray) -> float:
    """Sine of the largest angle between the spans of two sets of orthonormal rows of the same size."""
    a = a.double().flatten(1).numpy()
    return float(np.linalg.norm(a - a @ b.T @ b, 2))


# --- a null space exists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "dropped", "trailing"),
    [
        (0, 1, (1, 3, 3)),  # nothing stays
        (0, 4, (2, 2, 2)),  # n + M = d
        (5, 2, (1, 3, 3)),  # n + M = d
        (20, 10, (8, 3, 3)),
        (45, 19, (64, 3, 3)),
        (40, 10, (60, 1, 1)),
        (44, 10, (64,)),  # two-dimensional weights; n + M = d
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_new_filters_are_orthogonal_to_all_where_there_is_room(kept, dropped, trailing, dtype):
    kept, dropped = randn(kept, *trailing, seed=1).to(dtype), randn(dropped, *trailing, seed=2).to(dtype)
    new = least_overlap_filters(kept, dropped, generator(3))
    assert new.shape == dropped.shape and new.dtype == dtype
    assert_null(new, kept, dropped)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e20])
def test_size_of_the_filters_does_not_matter(size):
    kept, dropped = randn(12, 4, 3, 3, seed=1) * size, randn(6, 4, 3, 3, seed=2)
    assert_null(least_overlap_filters(kept, dropped, generator(0)), kept, dropped)


# (K, M, d, rank of all rows): n + M > d, and yet M directions are free.
RANK_DEFICIENT = [(20, 10, 32, 12), (30, 12, 32, 8), (60, 20, 32, 12), (40, 1, 16, 15), (3, 3, 8, 2), (20, 8, 16, 8)]


@pytest.mark.parametrize(("kept", "dropped", "dimension", "rank"), RANK_DEFICIENT)
@pytest.mark.parametrize("kind", ["combinations", "copies"])
def test_dependent_filters_leave_a_null_space(kept, dropped, dimension, rank, kind):
    rng = np.random.default_rng(1)
    source = rng.standard_normal((rank, dimension))
    count = kept + dropped
    if kind == "combinations":
        rows = rng.standard_normal((count, rank)) @ source
    else:
        rows = source[np.arange(count) % rank] * rng.uniform(0.1, 10, (count, 1)) * rng.choice([-1, 1], (count, 1))
    rows = torch.tensor(rows, dtype=torch.float32)
    new = least_overlap_filters(rows[:kept], rows[kept:], generator(0))
    # Rounding to single precision tilts each row by at most about 1e-7.
    assert_null(new, rows)


NEAR = [1e-2, 1e-4, 1e-5, 1e-6, 1e-7]


@pytest.mark.parametrize("difference", NEAR)
def test_near_copies_among_the_kept_filters_with_room_for_all(difference):
    base = randn(20, 16, 3, 3, seed=1)
    kept = torch.cat([base, base + difference * randn(20, 16, 3, 3, seed=2)])
    dropped = base[:8] + difference * randn(8, 16, 3, 3, seed=3)
    assert_null(least_overlap_filters(kept, dropped, generator(0)), kept, dropped)


@pytest.mark.parametrize("difference", NEAR)
@pytest.mark.parametrize("copies", [2, 60, 500])
def test_near_copies_beside_exact_copies_that_leave_a_null_space(difference, copies):
    # rank 20 + 1 in 64 dimensions, 43 new filters: exactly the null space, with no room for the near copy's direction.
    base = randn(20, 64, seed=1)
    near = base[:1] + difference * randn(1, 64, seed=2)
    kept = torch.cat([base, near, base[1:2].repeat(copies, 1)])
    dropped = base[2:3].repeat(43, 1)
    assert_null(least_overlap_filters(kept, dropped, generator(0)), kept, dropped)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    ("kept", "dropped", "dimension"), [(6, 4, 32), (14, 1, 16), (20, 10, 24), (20, 10, 16), (4, 20, 8)]
)
def test_rows_without_a_direction_are_no_obstacle(bad, kept, dropped, dimension):
    kept, dropped = randn(kept, dimension, seed=1), randn(dropped, dimension, seed=2)
    kept[::2, 0] = bad
    dropped[-1, 0] = bad
    if bad == 0:
        kept[::2] = 0
        dropped[-1] = 0
    new = least_overlap_filters(kept, dropped, generator(0))
    assert torch.isfinite(new).all()
    others = unit_rows(kept, dropped)
    if len(dropped) <= dimension:
        assert_orthonormal(new)
        best = np.linalg.eigvalsh(others.T @ others)[: len(dropped)].clip(0).sum()
        assert objective(new, others) == pytest.approx(best, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("kept", "dropped", "dimension"), [(0, 3, 8), (5, 3, 8), (5, 8, 8), (9, 20, 8)])
def test_nothing_but_zero_filters(kept, dropped, dimension):
    new = least_overlap_filters(torch.zeros(kept, dimension), torch.zeros(dropped, dimension), generator(0))
    assert torch.isfinite(new).all()
    assert_orthonormal(new[: min(dropped, dimension)])


# --- no null space, or not enough of it -----------------------------------------------------------------------------

CROWDED = [
    (180, 76, (64, 1, 1)),  # conv3 of res2: 256 filters in 64 dimensions; M > d
    (20, 8, (16, 1, 1)),  # n >= d
    (10, 5, (12, 1, 1)),  # n >= d
    (8, 3, (10, 1, 1)),  # n > d
    (7, 4, (12, 1, 1)),  # n < d < n + M: a null space of 1 for 4
    (5, 9, (2, 2, 4)),  # n < d: a null space of 2 for 9
    (3, 16, (16,)),  # M = d
    (0, 5, (8,)),  # only the old filters
    (0, 8, (8,)),
    (2, 1, (1,)),
    (3, 2, (2,)),
]


@pytest.mark.parametrize(("kept", "dropped", "trailing"), CROWDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_new_filters_have_the_least_total_overlap(kept, dropped, trailing, dtype):
    kept, dropped = randn(kept, *trailing, seed=1).to(dtype), randn(dropped, *trailing, seed=2).to(dtype)
    new = least_overlap_filters(kept, dropped, generator(3))
    assert new.shape == dropped.shape and new.dtype == dtype
    others = unit_rows(kept, dropped)
    dimension = others.shape[1]
    values, vectors = np.linalg.eigh(others.T @ others)
    whole, rest = divmod(len(dropped), dimension)
    best = whole * values.sum() + values[:rest].sum()
    assert objective(new, others) == pytest.approx(best, rel=1e-5, abs=1e-9)
    for first in range(0, len(new), dimension):
        assert_orthonormal(new[first : first + dimension])
    if whole == 0 and values[rest] - values[rest - 1] > 1e-2:
        assert subspace_distance(new, vectors[:, :rest].T) <= 1e-4


def test_a_partial_null_space_is_used_before_anything_else():
    kept, dropped = randn(7, 16, seed=1), randn(6, 16, seed=2)  # null space of 3 for 6
    new = least_overlap_filters(kept, dropped, generator(0)).double().numpy()
    others = unit_rows(kept, dropped)
    null = np.linalg.svd(others)[2][13:]
    # The whole null space lies in the span of the new rows, and so do the 3 directions that come next.
    np.testing.assert_allclose(np.linalg.norm(null @ new.T, axis=1), 1, atol=1e-5)
    values = np.linalg.eigvalsh(others.T @ others)
    assert np.abs(values[:3]).max() < 1e-12
    assert ((others @ new.T) ** 2).sum() == pytest.approx(values[3:6].sum(), rel=1e-5)


@pytest.mark.parametrize("gap", [1e-3, 1e-4, 1e-5])
def test_eigenvalues_that_differ_clearly_are_not_mixed(gap):
    # Row lengths do not count, so a spectrum is set by cosines: two pairs of unit rows in planes of their own.
    angles = [0.5, 0.5 + gap]
    rows = torch.zeros(4, 4, dtype=torch.float64)
    for plane, angle in enumerate(angles):
        for side, sign in enumerate((1, -1)):
            rows[2 * plane + side, 2 * plane] = np.cos(angle)
            rows[2 * plane + side, 2 * plane + 1] = sign * np.sin(angle)
    # eigenvalues 2 sin^2 (small, one in each plane) and 2 cos^2
    new = least_overlap_filters(rows[1:], rows[:1], generator(0))
    expected = np.zeros((1, 4))
    expected[0, 1] = 1
    assert subspace_distance(new, expected) <= 1e-6


# --- more new filters than dimensions -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "dropped", "dimension"), [(30, 20, 8), (30, 16, 8), (0, 9, 4), (5, 41, 8)])
def test_more_filters_than_dimensions_come_as_rotated_bases(kept, dropped, dimension):
    kept, dropped = randn(kept, dimension, 1, 1, seed=1), randn(dropped, dimension, 1, 1, seed=2)
    new = least_overlap_filters(kept, dropped, generator(0))
    blocks = new.flatten(1).split(dimension)
    for block in blocks:
        assert_orthonormal(block)
    rows = new.flatten(1)
    distance = torch.cdist(rows, rows) + 10 * torch.eye(len(rows))
    assert distance.min() > 1e-2
    others = unit_rows(kept, dropped)
    rest = len(dropped) % dimension
    if rest:
        best = np.linalg.eigvalsh(others.T @ others)[:rest].sum()
        assert objective(blocks[-1], others) == pytest.approx(best, rel=1e-5, abs=1e-9)


# --- randomness -----------------------------------------------------------------------------------------------------

ANY = [(20, 6, 40), (20, 10, 32), (40, 6, 16), (7, 4, 12), (9, 20, 8), (9, 8, 8)]


@pytest.mark.parametrize(("kept", "dropped", "dimension"), ANY)
def test_same_seed_same_filters_and_no_draw_from_the_default_generator(kept, dropped, dimension):
    kept, dropped = randn(kept, dimension, seed=1), randn(dropped, dimension, seed=2)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = least_overlap_filters(kept, dropped, generator(7))
    assert torch.equal(first, least_overlap_filters(kept, dropped, generator(7)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    by_default = least_overlap_filters(kept, dropped)
    torch.manual_seed(11)
    assert torch.equal(by_default, least_overlap_filters(kept, dropped))


def rank_deficient(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    source = randn(4, 16, seed=seed)
    return source[[0, 1, 2, 3] * 5], source[:3]


def zeros_to_the_brim() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(13, 16), torch.eye(16)[:1]


def copies_to_the_brim() -> tuple[torch.Tensor, torch.Tensor]:
    return randn(1, 16, seed=1).repeat(14, 1), randn(1, 16, seed=1)


def stacked_bases(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor(bases(3, 16, seed=1)).to(dtype)
    return rows[5:], rows[:5]


def identity_twice() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.eye(16).repeat(2, 1)
    return rows[4:], rows[:4]


DEGENERATE = {
    "null space": lambda: (randn(4, 16, seed=1), randn(3, 16, seed=2)),
    "rank deficient": rank_deficient,
    "zero rows, n + M = d": zeros_to_the_brim,
    "copies, n + M = d": copies_to_the_brim,
    "bases in double": lambda: stacked_bases(torch.float64),
    "bases in single": lambda: stacked_bases(torch.float32),
    "identity": identity_twice,
    "one whole basis, M = d": lambda: (randn(9, 8, seed=1), randn(8, 8, seed=2)),
    "M > d": lambda: (randn(9, 8, seed=1), randn(16, 8, seed=2)),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_directions_inside_an_eigenspace_depend_on_the_seed(case):
    kept, dropped = DEGENERATE[case]()
    first, second = (least_overlap_filters(kept, dropped, generator(seed)) for seed in (1, 2))
    smallest = 1 - (first * second).sum(1).abs().min().item()
    assert smallest > 1e-2, "no direction changed"
    assert (first - second).norm(dim=1).min() > 1e-2
    others = unit_rows(kept, dropped)
    assert objective(first, others) == pytest.approx(objective(second, others), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("case", ["null space", "rank deficient", "zero rows, n + M = d", "copies, n + M = d"])
def test_directions_are_uniform_in_the_null_space(case):
    """In coordinates of the null space (dimension k) a uniform unit vector has mean 0 and covariance I / k."""
    kept, dropped = DEGENERATE[case]()
    draws = 400
    others = unit_rows(kept, dropped)
    values, vectors = np.linalg.eigh(others.T @ others)
    null = vectors[:, values < 1e-6]
    size = null.shape[1]
    for row in range(len(dropped)):
        found = [least_overlap_filters(kept, dropped, generator(seed))[row].numpy() for seed in range(draws)]
        coordinates = np.stack(found) @ null
        np.testing.assert_allclose(np.linalg.norm(coordinates, axis=1), 1, atol=1e-5)
        # One standard error of an entry of the mean is (k draws)^-1/2, of the covariance at most 1.5 / k / draws^1/2.
        assert np.abs(coordinates.mean(0)).max() < 4.5 / (size * draws) ** 0.5
        covariance = coordinates.T @ coordinates / draws
        assert np.abs(covariance - np.eye(size) / size).max() < 4.5 * 1.5 / size / draws**0.5


def test_a_direction_that_is_determined_has_either_sign():
    """A filter and its negative overlap as little; which of the two comes is left to chance too."""
    kept, dropped = randn(20, 3, seed=1), randn(1, 3, seed=2)
    draws = torch.stack([least_overlap_filters(kept, dropped, generator(seed))[0] for seed in range(200)])
    same_sign = draws @ draws[0] > 0
    torch.testing.assert_close(draws.abs(), draws[:1].abs().expand_as(draws))
    assert 70 < same_sign.sum() < 130  # four standard deviations


def test_bases_are_uniformly_rotated():
    draws = 400
    kept, dropped = randn(5, 4, seed=1), randn(4, 4, seed=2)
    rotations = torch.stack([least_overlap_filters(kept, dropped, generator(seed)) for seed in range(draws)])
    assert rotations.mean(0).abs().max() < 4.5 / (4 * draws) ** 0.5
    np.testing.assert_allclose(rotations.square().mean(0).numpy(), 1 / 4, atol=4.5 * 1.5 / 4 / draws**0.5)
    assert 0.4 < (torch.linalg.det(rotations) > 0).float().mean() < 0.6


# --- the rest of the contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3])
def test_no_dropped_filters_no_new_ones(kept):
    new = least_overlap_filters(randn(kept, 2, 3, 3), randn(0, 2, 3, 3))
    assert new.shape == (0, 2, 3, 3)


@pytest.mark.parametrize(("kept", "dropped", "dimension"), ANY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights(kept, dropped, dimension, dtype):
    kept, dropped = randn(kept, dimension, seed=1).to(dtype), randn(dropped, dimension, seed=2).to(dtype)
    new = least_overlap_filters(kept, dropped, generator(0))
    assert new.dtype == dtype
    unit = torch.finfo(dtype).eps
    for block in new.split(dimension):
        assert_orthonormal(block, atol=2 * unit)
    others = unit_rows(kept, dropped)
    if len(dropped) <= dimension:
        best = np.linalg.eigvalsh(others.T @ others)[: len(dropped)].clip(0).sum()
        assert objective(new, others) <= best * (1 + 4 * unit) + len(others) * len(dropped) * unit**2


def test_kept_filters_of_another_type_and_parameters_with_gradients():
    kept, dropped = torch.nn.Parameter(randn(5, 3, 3, 3).half()), torch.nn.Parameter(randn(4, 3, 3, 3, seed=1))
    before = kept.detach().clone(), dropped.detach().clone()
    new = least_overlap_filters(kept, dropped, generator(0))
    assert new.dtype == torch.float32 and not new.requires_grad
    assert_null(new, kept, dropped)
    assert torch.equal(kept.detach(), before[0]) and torch.equal(dropped.detach(), before[1])


def test_filters_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(3, 2, 3, 3\), \(2, 2, 1, 1\)"):
        least_overlap_filters(randn(3, 2, 3, 3), randn(2, 2, 1, 1))


@pytest.mark.parametrize(("kept", "dropped", "dimension"), [(180, 76, 576), (180, 76, 64)])
def test_autocast_does_not_lower_the_precision(kept, dropped, dimension):
    kept, dropped = randn(kept, dimension, seed=1), randn(dropped, dimension, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = least_overlap_filters(kept, dropped, generator(0))
        score = inter_filter_orthogonality(kept)
    for block in new.split(dimension):
        assert_orthonormal(block)
    if dimension == 576:
        assert_null(new, kept, dropped)
    np.testing.assert_allclose(score.numpy(), overlap_by_hand(kept), atol=1e-12)
