"""Ranking criteria against closed forms in NumPy."""

import numpy as np
import pytest
import torch
from textbook import textbook_overlap
from torch import nn

from repr_det.method.criteria import Context, get_criterion
from repr_det.method.layers import FilterLayer, find_filter_layers

# (J, C_in / groups, kh, kw): one filter, fewer filters than d, as many, more, depth-wise, wide.
SHAPES = [(1, 4, 3, 3), (8, 16, 3, 3), (36, 4, 3, 3), (64, 16, 1, 1), (12, 1, 3, 3), (16, 64, 3, 3)]


def make(shapes=SHAPES, seed: int = 0) -> list[FilterLayer]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict()
    for number, (filters, inputs, height, width) in enumerate(shapes):
        model[f"conv{number}"] = conv = nn.Conv2d(inputs, filters, (height, width))
        conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * 10.0 ** (number - 2)
    return find_filter_layers(model, ["*"])


def scores(name: str, layers: list[FilterLayer], seed: int = 0) -> dict[str, np.ndarray]:
    """It draws from its own generator alone."""
    state = torch.get_rng_state()
    found = get_criterion(name).score(layers, Context(torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: value.shape for key, value in found.items()} == {x.name: (x.num_filters,) for x in layers}
    return {key: value.double().numpy() for key, value in found.items()}


def mean_cosine(dimension: int) -> float:
    vectors = np.random.default_rng(0).standard_normal((200_000 // dimension, 2, dimension))
    return np.abs((vectors[:, 0] * vectors[:, 1]).sum(1) / np.linalg.norm(vectors, axis=2).prod(1)).mean()


def calibrated(weight: torch.Tensor) -> np.ndarray:
    """O_f over its expectation."""
    filters, dimension = len(weight), weight[0].numel()
    return textbook_overlap(weight) / (mean_cosine(dimension) * max(filters - 1, 1) / filters)


def released(weight: torch.Tensor) -> np.ndarray:
    """One norm, and the absolute value of the mean."""
    rows = weight.detach().double().flatten(1).numpy()
    rows = rows / np.sqrt((rows**2).sum())
    return np.abs((rows @ rows.T - np.eye(len(rows))).mean(1))


def mean_square(weight: torch.Tensor) -> np.ndarray:
    return -(weight.detach().double().flatten(1).numpy() ** 2).mean(1)


FORMULAS = {
    "ortho": (textbook_overlap, 1e-9),
    "ortho_calibrated": (calibrated, 0.06),  # four standard errors
    "ortho_released": (released, 1e-5),
    "weight_norm": (mean_square, 1e-5),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_criterion_is_its_formula(name):
    layers, (formula, tolerance) = make(), FORMULAS[name]
    for layer, found in zip(layers, scores(name, layers).values(), strict=True):
        np.testing.assert_allclose(found, formula(layer.weight), rtol=tolerance, atol=1e-7)
    assert all(torch.equal(layer.weight, other.weight) for layer, other in zip(layers, make(), strict=True))


def test_random_depends_on_the_generator_alone():
    first, other = (scores("random", make(), seed) for seed in (1, 2))
    elsewhere = scores("random", make(seed=5), 1)
    for name in first:
        np.testing.assert_array_equal(first[name], elsewhere[name])
        assert (first[name] != other[name]).all()
    # Layers do not repeat each other's numbers, and no layer is preferred.
    assert len(np.unique(np.concatenate(list(first.values())))) == sum(shape[0] for shape in SHAPES)
    (many,) = scores("random", make([(4096, 1, 1, 1)])).values()
    assert many.mean() == pytest.approx(0.5, abs=4 / (12 * 4096) ** 0.5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scores_are_never_nan(name, bad, dtype):
    layers = make()
    for layer in layers:
        layer.conv.to(dtype)
        layer.weight.detach()[::3] = bad
    layers[2].weight.detach().fill_(bad)
    for layer_scores in scores(name, layers).values():
        assert not np.isnan(layer_scores).any()
