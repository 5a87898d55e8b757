"""Inter-filter orthogonality against its closed form, the directions of returning filters against numpy.linalg."""

import numpy as np
import pytest
import torch
from textbook import textbook_overlap, unit_rows

from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (3, 3, 1, 1), (16, 1, 3, 3), (40, 8, 1, 1), (5, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_metric_is_the_closed_form(shape, dtype):
    weight = torch.nn.Parameter(randn(*shape, seed=1).to(dtype))
    found = inter_filter_orthogonality(weight)
    assert found.shape == shape[:1] and found.dtype == torch.float64 and not found.requires_grad
    np.testing.assert_allclose(found.numpy(), textbook_overlap(weight), atol=1e-14, rtol=0)
    assert torch.equal(weight.detach(), randn(*shape, seed=1).to(dtype))


@pytest.mark.parametrize("factor", [0, "nan", "inf", 1e-42, 1e-20, 1e37, 1e-300, 1e300])
def test_metric_of_rows_of_any_size_and_without_a_direction(factor):
    factor = float(factor)
    weight = randn(8, 2, 3, 3, seed=3).to(torch.float64 if factor in (1e-300, 1e300) else torch.float32)
    weight[::2] *= factor
    weight[1, 0, 1, 1] *= factor
    found = inter_filter_orthogonality(weight)
    np.testing.assert_allclose(found.numpy(), textbook_overlap(weight), atol=1e-14)
    assert found[1::2].isfinite().all() and found[::2].any() == (0 < factor < float("inf"))


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 4, dtype=torch.int64)])
def test_metric_refuses_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="floating-point tensor"):
        inter_filter_orthogonality(weight)


def assert_least(new: torch.Tensor, *others: torch.Tensor, rel: float = 1e-5, atol: float = 1e-5) -> None:
    """Bases, each orthonormal, with the least total overlap that d directions can have: eigenvalues of A^T A; at most
    1e-5 each if there is a null space for all."""
    rows, found, dimension = unit_rows(*others), new.double().flatten(1).numpy(), new[0].numel()
    for block in np.split(found, range(dimension, len(found), dimension)):
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), rtol=0, atol=atol)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    whole, rest = divmod(len(new), dimension)
    best = whole * values.sum() + values[:rest].clip(0).sum()
    cosines = np.abs(rows @ found.T)
    assert (cosines**2).sum() == pytest.approx(best, rel=rel, abs=1e-9)
    if whole == 0 and values[rest - 1] < 1e-10:
        assert cosines.max(initial=0) <= 1e-5
    elif whole == 0 and rest and values[rest] - values[rest - 1] > 1e-2:  # these directions and no others
        span = vectors[:, :rest]
        assert np.linalg.norm(found - found @ span @ span.T, 2) <= 1e-4


SIZES = [
    (0, 1, (1, 3, 3)),  # nothing stays
    (5, 2, (1, 3, 3)),  # n + M = d
    (20, 10, (8, 3, 3)),
    (44, 10, (64,)),  # two-dimensional weights; n + M = d
    # No null space, or not enough of it.
    (180, 76, (64, 1, 1)),  # conv3 of res2: 256 filters in 64 dimensions; M > d
    (7, 6, (16,)),  # n < d < n + M: a null space of 3 for 6
    (3, 16, (16,)),  # M = d
    (2, 1, (1,)),
    # More than there are dimensions: rotated bases.
    (30, 16, (8,)),
    (5, 41, (8,)),
]


@pytest.mark.parametrize(("kept", "dropped", "trailing"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_new_filters_have_the_least_total_overlap(kept, dropped, trailing, dtype):
    """They depend on the generator alone; kept and dropped filters are left as they were."""
    kept, dropped = randn(kept, *trailing, seed=1).to(dtype), randn(dropped, *trailing, seed=2).to(dtype)
    before, state = (kept.clone(), dropped.clone()), torch.get_rng_state()
    new = least_overlap_filters(torch.nn.Parameter(kept), dropped, generator(3))
    assert new.shape == dropped.shape and new.dtype == dtype and not new.requires_grad
    exact = least_overlap_filters(kept.double(), dropped.double(), generator(3))
    assert_least(exact, kept, dropped)
    assert torch.equal(new, exact.to(dtype))  # rounding is all that sets it apart
    distance = torch.cdist(new.double().flatten(1), new.double().flatten(1)) + 10 * torch.eye(len(new))
    assert distance.min() > 1e-2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kept, before[0]) and torch.equal(dropped, before[1])
    torch.manual_seed(3)
    assert torch.equal(new, least_overlap_filters(kept, dropped))  # from torch's own generator


def dependent(kept, dropped, dimension, rank):
    """Rows of a lower rank: n + M > d, and yet M directions are free."""
    rows = randn(kept + dropped, rank, seed=1) @ randn(rank, dimension, seed=2)
    return rows[:kept], rows[kept:]


def nearly_copies(difference, copies):
    """With room for all, or beside exact copies: rank 20 + 1 in 64 dimensions, 43 new filters are exactly the null
    space, with no room for the near copy's direction."""
    base = randn(20, 64, seed=1)
    if copies:
        near = base[:1] + difference * randn(1, 64, seed=2)
        return torch.cat([base, near, base[1:2].repeat(copies, 1)]), base[2:3].repeat(43, 1)
    kept = torch.cat([base, base + difference * randn(20, 64, seed=2)])
    return kept, base[:8] + difference * randn(8, 64, seed=3)


def without_a_direction(kept, dropped, dimension, bad):
    rows = randn(kept + dropped, dimension, seed=1)
    rows[::2] = bad
    return rows[:kept], rows[kept:]


ODD_SIZES = [(6, 4, 32), (20, 10, 16), (4, 20, 8)]
ODD = [
    *((dependent, *sizes) for sizes in [(20, 10, 32, 12), (60, 20, 32, 12), (40, 1, 16, 15)]),
    *((nearly_copies, 10.0**-power, copies) for power in (2, 5, 6, 7) for copies in (0, 2, 500)),
    *((without_a_direction, *sizes, bad) for sizes in ODD_SIZES for bad in (0.0, float("nan"), float("inf"))),
    *((lambda size: (size * randn(12, 36, seed=1).double(), randn(6, 36, seed=2)), size) for size in (1e-20, 1e20)),
    *((lambda *sizes: (torch.zeros(sizes[0], 8), torch.zeros(sizes[1], 8)), *sizes) for sizes in [(0, 3), (9, 20)]),
]


@pytest.mark.parametrize("case", ODD, ids=lambda case: " ".join(map(str, case[1:])))
def test_filters_that_depend_on_each_other_or_have_no_direction(case):
    make, *arguments = case
    kept, dropped = make(*arguments)
    assert_least(least_overlap_filters(kept, dropped, generator(0)), kept, dropped, rel=1e-4)


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_eigenvalues_that_differ_clearly_are_not_mixed(gap):
    # Row lengths do not count, so a spectrum is set by cosines: two pairs of unit rows in planes of their own.
    rows = torch.zeros(4, 4, dtype=torch.float64)
    for plane, angle in enumerate([0.5, 0.5 + gap]):
        rows[2 * plane : 2 * plane + 2, 2 * plane] = np.cos(angle)
        rows[2 * plane, 2 * plane + 1], rows[2 * plane + 1, 2 * plane + 1] = np.sin(angle), -np.sin(angle)
    # eigenvalues 2 sin^2 (small, one in each plane) and 2 cos^2
    new = least_overlap_filters(rows[1:], rows[:1], generator(0))
    assert new.abs()[0, 1] > 1 - 1e-12


def stacked_bases(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    bases = [np.linalg.qr(rng.standard_normal((16, 16)))[0] for _ in range(3)]
    rows = torch.tensor(np.concatenate(bases)).to(dtype)
    return rows[5:], rows[:5]


DEGENERATE = {
    "null space": lambda: (randn(4, 16, seed=1), randn(3, 16, seed=2)),
    "bases in double": lambda: stacked_bases(torch.float64),
    "bases in single": lambda: stacked_bases(torch.float32),
    "one whole basis, M = d": lambda: (randn(9, 8, seed=1), randn(8, 8, seed=2)),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_directions_inside_an_eigenspace_depend_on_the_seed(case):
    kept, dropped = DEGENERATE[case]()
    first, second = (least_overlap_filters(kept, dropped, generator(seed)) for seed in (1, 2))
    assert (first - second).norm(dim=1).min() > 1e-2


@pytest.mark.parametrize("case", ["null space", "one whole basis, M = d"])
def test_directions_are_uniform_in_the_null_space(case):
    """In coordinates of the null space (dimension k; or of all of space) a uniform unit vector has mean 0 and
    covariance I / k."""
    kept, dropped = DEGENERATE[case]()
    draws, others = 300, unit_rows(kept, dropped)
    values, vectors = np.linalg.eigh(others.T @ others)
    space = vectors if len(dropped) == len(vectors) else vectors[:, values < 1e-6]
    size = space.shape[1]
    found = torch.stack([least_overlap_filters(kept, dropped, generator(seed)) for seed in range(draws)]).numpy()
    for coordinates in (found @ space).transpose(1, 0, 2):
        np.testing.assert_allclose(np.linalg.norm(coordinates, axis=1), 1, atol=1e-5)
        # One standard error of an entry of the mean is (k draws)^-1/2, of the covariance at most 1.5 / k / draws^1/2.
        assert np.abs(coordinates.mean(0)).max() < 4.5 / (size * draws) ** 0.5
        covariance = coordinates.T @ coordinates / draws
        assert np.abs(covariance - np.eye(size) / size).max() < 4.5 * 1.5 / size / draws**0.5


def test_a_direction_that_is_determined_has_either_sign():
    """A filter and its negative overlap as little; which of the two comes is left to chance too."""
    kept, dropped = randn(20, 3, seed=1), randn(1, 3, seed=2)
    draws = torch.stack([least_overlap_filters(kept, dropped, generator(seed))[0] for seed in range(200)])
    torch.testing.assert_close(draws.abs(), draws[:1].abs().expand_as(draws))
    assert 70 < (draws @ draws[0] > 0).sum() < 130  # four standard deviations


def test_no_dropped_filters_no_new_ones_and_shapes_that_differ_are_refused():
    assert least_overlap_filters(randn(3, 2, 3, 3), randn(0, 2, 3, 3)).shape == (0, 2, 3, 3)
    with pytest.raises(ValueError, match=r"differ in shape: \(3, 2, 3, 3\), \(2, 2, 1, 1\)"):
        least_overlap_filters(randn(3, 2, 3, 3), randn(2, 2, 1, 1))


def test_autocast_does_not_lower_the_precision():
    kept, dropped = randn(180, 576, seed=1), randn(76, 576, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = least_overlap_filters(kept, dropped, generator(0))
    assert_least(new, kept, dropped)
