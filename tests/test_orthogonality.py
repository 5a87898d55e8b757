"""Inter-filter orthogonality against its closed form."""

import numpy as np
import pytest
import torch

from repr_det.method.orthogonality import expected_overlap, inter_filter_orthogonality, overlap_of_kept


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def overlap_by_hand(weight: torch.Tensor) -> np.ndarray:
    """O_f = sum_j |What What^T - I|[f, j] / J, filter by filter in float64, with 0 for a row that has no direction."""
    rows = weight.detach().double().flatten(1).numpy()
    usable = [bool(np.isfinite(r).all() and np.abs(r).max() > 0) for r in rows]
    unit = [r / np.abs(r).max() if u else r for r, u in zip(rows, usable, strict=True)]
    unit = [r / np.linalg.norm(r) if u else r for r, u in zip(unit, usable, strict=True)]
    out = np.zeros(len(rows))
    for f in range(len(rows)):
        for j in range(len(rows)):
            if f != j and usable[f] and usable[j]:
                out[f] += abs(float(unit[f] @ unit[j])) / len(rows)
    return out


SHAPES = [(1, 5), (2, 1), (3, 3, 1, 1), (7, 4, 3, 3), (16, 1, 3, 3), (40, 8, 1, 1), (5, 64, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_metric_is_the_closed_form(shape, dtype):
    weight = randn(*shape, seed=1).to(dtype)
    found = inter_filter_orthogonality(weight)
    assert found.shape == shape[:1] and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), overlap_by_hand(weight), atol=1e-14, rtol=0)


def test_metric_of_one_filter_of_orthogonal_filters_and_of_copies():
    assert inter_filter_orthogonality(randn(1, 3, 3, 3)).tolist() == [0.0]
    identity = torch.eye(6).reshape(6, 6, 1, 1) * torch.arange(1, 7).view(6, 1, 1, 1)
    assert inter_filter_orthogonality(identity).tolist() == [0.0] * 6
    copies = randn(1, 12).repeat(4, 1) * torch.tensor([[1.0], [-2.0], [1e-3], [50.0]])
    np.testing.assert_allclose(inter_filter_orthogonality(copies), 3 / 4, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")], ids=str)
def test_metric_gives_rows_without_a_direction_no_overlap(bad):
    weight = randn(6, 2, 3, 3, seed=2)
    weight[1] = 0 if bad == 0 else weight[1]
    weight[1, 0, 1, 1] = bad
    weight[4] = bad
    found = inter_filter_orthogonality(weight)
    np.testing.assert_allclose(found.numpy(), overlap_by_hand(weight), atol=1e-6)
    assert torch.isfinite(found).all() and found[1] == found[4] == 0
    assert inter_filter_orthogonality(torch.full((3, 4), bad)).tolist() == [0.0] * 3


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-20, 1e18, 1e30, 1e37])
def test_metric_does_not_depend_on_the_size_of_filters(scale):
    weight = randn(8, 30, seed=3)
    scaled = weight.clone()
    scaled[::2] *= scale  # 1e-42 is subnormal: two or three digits are left
    tolerance = 2e-2 if scale < 1e-40 else 1e-6
    expected = overlap_by_hand(weight)
    np.testing.assert_allclose(inter_filter_orthogonality(scaled).numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_metric_in_double_precision_does_not_overflow(scale):
    weight = randn(8, 30, seed=3).double()
    np.testing.assert_allclose(inter_filter_orthogonality(weight * scale).numpy(), overlap_by_hand(weight), atol=1e-12)


def test_metric_follows_a_permutation_of_the_filters_and_of_the_inputs():
    weight = randn(24, 5, 3, 3, seed=4)
    order = torch.randperm(24, generator=generator(5))
    found = inter_filter_orthogonality(weight)
    torch.testing.assert_close(inter_filter_orthogonality(weight[order]), found[order], atol=1e-12, rtol=0)
    inputs = torch.randperm(5, generator=generator(6))
    torch.testing.assert_close(inter_filter_orthogonality(weight[:, inputs]), found, atol=1e-12, rtol=0)


def test_metric_leaves_its_argument_and_the_graph_alone():
    weight = torch.nn.Parameter(randn(4, 3, 3, 3))
    before = weight.detach().clone()
    assert not inter_filter_orthogonality(weight).requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 4, dtype=torch.int64)])
def test_metric_refuses_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="floating-point tensor"):
        inter_filter_orthogonality(weight)


@pytest.mark.parametrize(("filters", "dimension"), [(1, 4), (2, 1), (8, 2), (10, 9), (6, 64), (16, 576)])
def test_expected_overlap_is_the_mean_over_random_filters(filters, dimension):
    draws = 400
    rng = np.random.default_rng(0)
    total = []
    for _ in range(draws):
        rows = rng.standard_normal((filters, dimension))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        total.append(np.abs(rows @ rows.T - np.eye(filters)).sum() / filters / filters)
    error = 4 * np.std(total) / draws**0.5 + 1e-9
    assert expected_overlap(filters, dimension) == pytest.approx(np.mean(total), abs=error)


def test_expected_overlap_approaches_the_rule_of_thumb():
    # repr-method.md: E|cos| is about sqrt(2 / (pi d)).
    assert expected_overlap(10**6, 4608) == pytest.approx((2 / np.pi / 4608) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("shape", "num_dropped"), [((6, 9), 2), ((40, 3, 3, 3), 12), ((20, 64), 10), ((5, 3), 4)])
def test_overlap_of_kept_filters_is_their_own_metric(shape, num_dropped):
    weight = randn(*shape, seed=3)
    dropped = torch.zeros(len(weight), dtype=torch.bool)
    dropped[torch.randperm(len(weight), generator=generator(4))[:num_dropped]] = True
    np.testing.assert_allclose(overlap_of_kept(weight, dropped), overlap_by_hand(weight[~dropped]), atol=1e-12)
