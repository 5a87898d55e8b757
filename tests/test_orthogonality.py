"""Inter-filter orthogonality against its closed form."""

import numpy as np
import pytest
import torch
from textbook import textbook_overlap

from repr_det.method.orthogonality import inter_filter_orthogonality


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
