"""Ranking criteria against closed forms in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.selection import select_filters

# (J, C_in / groups, kh, kw): one filter, fewer filters than d, as many, more, depth-wise, wide.
SHAPES = [(1, 4, 3, 3), (8, 16, 3, 3), (36, 4, 3, 3), (64, 16, 1, 1), (12, 1, 3, 3), (16, 64, 3, 3)]


def make(shapes=SHAPES, seed: int = 0) -> list[FilterLayer]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict()
    for number, (filters, inputs, height, width) in enumerate(shapes):
        conv = nn.Conv2d(inputs, filters, (height, width))
        with torch.no_grad():
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * 10.0 ** (number - 2))
        model[f"conv{number}"] = conv
    return find_filter_layers(model, ["*"])


def scores(name: str, layers: list[FilterLayer], seed: int = 0) -> dict[str, np.ndarray]:
    criterion = get_criterion(name)
    assert not criterion.needs_data
    found = criterion.score(layers, Context(torch.Generator().manual_seed(seed)))
    assert list(found) == [layer.name for layer in layers]
    for layer in layers:
        assert found[layer.name].shape == (layer.num_filters,) and not found[layer.name].requires_grad
    return {key: value.double().numpy() for key, value in found.items()}


def rows(layer: FilterLayer) -> np.ndarray:
    return layer.weight.detach().double().flatten(1).numpy()


def off_diagonal(w: np.ndarray) -> np.ndarray:
    """|What What^T - I| with unit rows (eq. 1)."""
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    return np.abs(unit @ unit.T - np.eye(len(w)))


def test_ortho_is_the_formula_of_the_paper():
    layers = make()
    found = scores("ortho", layers)
    for layer in layers:
        np.testing.assert_allclose(found[layer.name], off_diagonal(rows(layer)).mean(1), atol=1e-6)


def test_calibrated_ortho_is_the_formula_over_its_expectation():
    layers = make()
    found = scores("ortho_calibrated", layers)
    rng = np.random.default_rng(0)
    for layer in layers:
        if layer.num_filters == 1:
            assert found[layer.name].tolist() == [0.0]
            continue
        filters, dimension = rows(layer).shape
        vectors = rng.standard_normal((100_000 // dimension, 2, dimension))
        cosines = np.abs((vectors[:, 0] * vectors[:, 1]).sum(1)) / np.linalg.norm(vectors, axis=2).prod(1)
        expected = off_diagonal(rows(layer)).mean(1) / (cosines.mean() * (filters - 1) / filters)
        error = 4 * cosines.std() / cosines.mean() / len(cosines) ** 0.5
        np.testing.assert_allclose(found[layer.name], expected, rtol=error)


@pytest.mark.parametrize("dimension", [2, 9, 64, 576, 4608])
@pytest.mark.parametrize("filters", [16, 256])
def test_calibrated_ortho_is_about_one_for_random_weights(filters, dimension):
    (layer,) = make([(filters, dimension, 1, 1)])
    found = scores("ortho_calibrated", [layer])["conv0"]
    # |cos| has a relative standard deviation of at most 0.76, and a score is the mean of J - 1 of them.
    assert found.mean() == pytest.approx(1, abs=4 * 0.76 / filters)
    assert np.abs(found - 1).max() < 5 * 0.76 / (filters - 1) ** 0.5


def test_released_ortho_is_one_norm_and_the_absolute_value_of_the_mean():
    layers = make()
    found = scores("ortho_released", layers)
    for layer in layers:
        w = rows(layer)
        what = w / np.sqrt((w**2).sum())
        signed = what @ what.T - np.eye(len(w))
        np.testing.assert_allclose(found[layer.name], np.abs(signed.mean(1)), rtol=1e-5, atol=1e-7)


def test_weight_norm_ranks_small_filters_first():
    layers = make()
    found = scores("weight_norm", layers)
    for layer in layers:
        np.testing.assert_allclose(found[layer.name], -(rows(layer) ** 2).mean(1), rtol=1e-5)
    mask = select_filters({"a": torch.tensor(found["conv3"])}, 0.25, 1.0)["a"]
    norms = np.linalg.norm(rows(layers[3]), axis=1)
    assert norms[mask.numpy()].max() < norms[~mask.numpy()].min()


def test_random_depends_on_the_generator_alone():
    layers = make()
    state = torch.get_rng_state()
    first, again, other = (scores("random", layers, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    elsewhere = scores("random", make(seed=5), 1)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], elsewhere[name])
        assert (first[name] != other[name]).all()
        assert ((first[name] >= 0) & (first[name] < 1)).all()
    # Layers do not repeat each other's numbers, and no layer is preferred.
    assert len(np.unique(np.concatenate(list(first.values())))) == sum(layer.num_filters for layer in layers)
    (many,) = scores("random", make([(4096, 1, 1, 1)])).values()
    assert many.mean() == pytest.approx(0.5, abs=4 / (12 * 4096) ** 0.5)


@pytest.mark.parametrize("name", ["ortho", "ortho_calibrated", "ortho_released", "weight_norm", "random"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_scores_are_never_nan(name, bad, dtype):
    layers = make()
    for layer in layers:
        layer.conv.to(dtype)
        with torch.no_grad():
            layer.weight[::3] = bad
    layers[2].weight.detach().fill_(bad)
    for layer_scores in scores(name, layers).values():
        assert not np.isnan(layer_scores).any()


@pytest.mark.parametrize("name", ["ortho", "ortho_calibrated", "ortho_released", "weight_norm"])
def test_scores_of_weights_do_not_change_them_and_draw_nothing(name):
    layers = make()
    before = [layer.weight.detach().clone() for layer in layers]
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    get_criterion(name).score(layers, Context(generator))
    assert torch.equal(generator.get_state(), state)
    assert all(torch.equal(layer.weight.detach(), w) for layer, w in zip(layers, before, strict=True))


def resnet50_shapes() -> list[tuple[int, int, int, int]]:
    shapes, inputs = [], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for _ in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            inputs = 4 * width
    return shapes


def test_untrained_resnet50_is_ranked_by_dimension_unless_calibrated():
    """repr-method.md, section 2: on an untrained ResNet-50 all 30 % fell in 17 of 48 layers."""
    layers = make(resnet50_shapes())
    assert sum(layer.num_filters for layer in layers) == 22656 and len(layers) == 48
    for layer in layers:
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(layer.num_filters))
    touched = {}
    for name in ("ortho", "ortho_calibrated"):
        found = {key: torch.tensor(value) for key, value in scores(name, layers).items()}
        masks = select_filters(found, 0.3, 1.0)
        assert sum(int(mask.sum()) for mask in masks.values()) == 6796
        touched[name] = sum(bool(mask.any()) for mask in masks.values())
    assert touched["ortho"] <= 20
    assert touched["ortho_calibrated"] >= 40


@pytest.mark.parametrize("name", ["orto", "", "ORTHO", None])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError) as error:
        get_criterion(name)
    message = str(error.value)
    assert message.startswith("criterion= must be one of ") and message.endswith(f"got {name!r}")
    assert all(known in message for known in ("ortho,", "ortho_calibrated", "ortho_released", "random", "weight_norm"))
    assert set(CRITERIA) >= {"ortho", "ortho_calibrated", "ortho_released", "random", "weight_norm"}
