"""Inter-filter orthogonality against its closed form."""

import numpy as np
import pytest
import torch
from textbook import textbook_overlap

from repr_det.method.orthogonality import expected_overlap, inter_filter_orthogonality, overlap_of_kept


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


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")], ids=str)
def test_metric_gives_rows_without_a_direction_no_overlap(bad):
    weight = randn(6, 2, 3, 3, seed=2)
    weight[1] = 0 if bad == 0 else weight[1]
    weight[1, 0, 1, 1] = bad
    weight[4] = bad
    found = inter_filter_orthogonality(weight)
    np.testing.assert_allclose(found.numpy(), textbook_overlap(weight), atol=1e-6)
    assert torch.isfinite(found).all() and found[1] == found[4] == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e18, 1e37, 1e-300, 1e300])
def test_metric_does_not_depend_on_the_size_of_filters(scale):
    weight = randn(8, 30, seed=3).to(torch.float32 if 1e-50 < scale < 1e50 else torch.float64)
    scaled = weight.clone()
    scaled[::2] *= scale  # 1e-42 is subnormal: two or three digits are left
    tolerance = 2e-2 if scale == 1e-42 else 1e-6
    np.testing.assert_allclose(inter_filter_orthogonality(scaled).numpy(), textbook_overlap(weight), atol=tolerance)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(3, 4, dtype=torch.int64)])
def test_metric_refuses_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="floating-point tensor"):
        inter_filter_orthogonality(weight)


@pytest.mark.parametrize(("filters", "dimension"), [(1, 4), (2, 1), (8, 2), (6, 64), (16, 576)])
def test_expected_overlap_is_the_mean_over_random_filters(filters, dimension):
    rows = np.random.default_rng(0).standard_normal((400, filters, dimension))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    means = np.abs(rows @ rows.transpose(0, 2, 1) - np.eye(filters)).mean((1, 2))
    assert expected_overlap(filters, dimension) == pytest.approx(means.mean(), abs=4 * means.std() / 20 + 1e-9)


@pytest.mark.parametrize("groups", [1, 4])
def test_overlap_inside_each_group_and_of_kept_filters_among_themselves(groups):
    weight, dropped = randn(40, 3, 3, 3, seed=3), torch.rand(40, generator=generator(4)) < 0.3
    np.testing.assert_allclose(inter_filter_orthogonality(weight, groups), textbook_overlap(weight, groups), atol=1e-12)
    kept = [textbook_overlap(part[~out]) for part, out in zip(weight.chunk(groups), dropped.chunk(groups), strict=True)]
    np.testing.assert_allclose(overlap_of_kept(weight, dropped, groups), np.concatenate(kept), atol=1e-12)
