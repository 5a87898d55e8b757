"""Ranking criteria against closed forms in NumPy, and the worst share over the network under a per-layer cap against a
loop that takes one filter after the other."""

from fractions import Fraction
from functools import partial
from math import ceil, floor

import numpy as np
import pytest
import torch
from conftest import GPU, refused
from gpu_nets import Loop, Net
from textbook import textbook_overlap
from torch import nn

from repr_det.method.criteria import CRITERIA, Context, get_criterion, select_filters
from repr_det.method.layers import FilterLayer, find_filter_layers

# (J, C_in / groups, kernel, groups): one filter, fewer filters than d, as many, more, with one channel, wide, grouped.
SHAPES = [(1, 4, 3, 1), (8, 16, 3, 1), (36, 4, 3, 1), (64, 16, 1, 1), (12, 1, 3, 1), (16, 64, 3, 1), (32, 4, 3, 4)]
NEVER = float("-inf")


def make(shapes=SHAPES, seed: int = 0) -> list[FilterLayer]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict()
    for number, (filters, inputs, kernel, groups) in enumerate(shapes):
        model[f"conv{number}"] = conv = nn.Conv2d(inputs * groups, filters, kernel, groups=groups)
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
    """One norm for all filters, and the absolute value of the mean projection on the others."""
    rows = weight.detach().double().flatten(1).numpy()
    projections = rows @ rows.T / (rows**2).sum()
    return np.abs((projections - np.diag(np.diag(projections))).mean(1))


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
        wanted = np.concatenate([formula(weight) for weight in layer.weight.chunk(layer.conv.groups)])
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=1e-7)
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


def test_a_function_gets_a_context_if_it_asks_for_one():
    def size(layer, power=2.0):
        return layer.weight.flatten(1).norm(p=power, dim=1)

    def of_batches(layer, context=None):
        return torch.full((layer.num_filters,), float(context.num_batches))

    layers, context = make(), Context(torch.Generator(), num_batches=3)
    for function, power in ((size, 2), (partial(size, power=3), 3)):
        found = get_criterion(function).score(layers, context)
        assert all(torch.equal(found[x.name], size(x, power)) for x in layers)
    assert all((score == 3).all() for score in get_criterion(of_batches).score(layers, context).values())


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


def greedy(scores, ratio: str, cap: str) -> dict[str, list[int]]:
    """Filters in the order (largest score, first layer, first index), each taken unless its layer is at its cap.

    Shares are decimal strings: floor and ceil are exact in fractions.
    """
    names = list(scores)
    ranked = sorted((-float(s), names.index(n), i) for n in names for i, s in enumerate(scores[n]))
    total = floor(Fraction(ratio) * len(ranked))
    caps = [min(len(scores[n]) - 1, ceil(Fraction(cap) * len(scores[n]))) for n in names]
    taken = {n: [] for n in names}
    for score, layer, index in ranked:
        room = sum(map(len, taken.values())) < total and len(taken[names[layer]]) < caps[layer]
        if room and score != -NEVER:
            taken[names[layer]].append(index)
    return {n: sorted(v) for n, v in taken.items()}


def selected(scores, ratio: str, cap: str) -> dict[str, list[int]]:
    before = {name: score.clone() for name, score in scores.items()}
    masks = select_filters(scores, float(ratio), float(cap))
    assert list(masks) == list(scores)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == scores[name].shape
        assert torch.equal(scores[name], before[name])
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


@pytest.mark.parametrize("levels", [None, 1, 2, 5])
@pytest.mark.parametrize(
    ("ratio", "cap"), [("0.3", "0.5"), ("0.3", "0.3"), ("0.1", "1"), ("0.29", "0.29"), ("0.05", "0.07")]
)
def test_selection_is_the_greedy_one(ratio, cap, levels):
    """``levels`` distinct scores (many ties), or ones that differ in double precision; some are never to be dropped."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = {}
        for layer in rng.permutation(rng.integers(1, 9)):
            size = int(rng.integers(1, 41))
            values = rng.integers(0, levels, size) if levels else 1 + 1e-12 * rng.standard_normal(size)
            scores[f"layer{layer}"] = torch.tensor(np.where(rng.random(size) < 0.05, NEVER, values))
        assert selected(scores, ratio, cap) == greedy(scores, ratio, cap)


@pytest.mark.parametrize("size", [10, 30, 64, 100])
def test_shares_are_decimal_numbers(size):
    # 0.29 * 100 is 28.999999999999996 in binary, 0.1 * 30 is 3.0000000000000004.
    for percent in range(2, 100):
        exact = Fraction(percent, 100)
        found = select_filters({"a": torch.zeros(size)}, percent / 100, 1.0)["a"]
        assert found.sum() == min(floor(exact * size), size - 1), percent
        # The second layer is large and good, so that only the cap limits the first.
        capped = select_filters({"a": torch.ones(size), "b": torch.zeros(49 * size)}, 0.02, percent / 100)["a"]
        assert capped.sum() == min(ceil(exact * size), size - 1), percent


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64], ids=str)
def test_scores_of_any_type_and_without_limits(dtype):
    scores = {"a": torch.tensor([1, 3, 2, 0, 0, 0]).to(dtype), "b": torch.tensor([5, -4, 0, 0]).to(dtype)}
    assert selected(scores, "0.3", "1") == {"a": [1, 2], "b": [0]}
    if dtype.is_floating_point:
        scores["b"][1], scores["a"][0] = float("inf"), NEVER
        assert selected(scores, "0.3", "1") == {"a": [1], "b": [0, 1]}


@pytest.mark.parametrize(
    ("sizes", "ratio", "cap", "told"),
    [
        ([10], 0.0, 0.5, "drop_ratio= must be in (0, 1), got 0.0"),
        ([10], 0.3, 1.01, "max_drop_per_layer= must be in (0, 1], got 1.01"),
        ([10, 20], 0.3, 0.2, "max_drop_per_layer= 0.2 lets 6 of 30 filters be dropped, drop_ratio= 0.3 needs 9"),
        ([1] * 10, 0.3, 1.0, "lets 0 of 10 filters be dropped, drop_ratio= 0.3 needs 3 (one of a layer stays)"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_had_are_refused(sizes, ratio, cap, told):
    scores = {str(i): torch.ones(size) for i, size in enumerate(sizes)}
    assert told in refused(select_filters, scores, ratio, cap)


def test_scores_that_are_not_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"filter 2 of res4\.0\.conv1 is NaN"):
        select_filters({"res3": torch.ones(4), "res4.0.conv1": torch.tensor([1, 2, float("nan")])}, 0.3, 0.5)


@pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("criterion", "norm"), [("ortho", "FrozenBN"), *((name, "BN") for name in CRITERIA)])
def test_a_drop_a_resume_and_a_restore_under_a_default_device(criterion, norm, default):
    """Where the model is not, or where it is; on "meta" tensors have no values. BN goes into eval mode meanwhile."""
    net = Net(norm).to("cuda" if default == "cuda" else "cpu")
    with torch.device(default):
        loop = Loop(net, criterion=criterion)
        for number in range(10):
            loop.step()
            if number == 7:
                net.norm1.eval()
                loop.training.load_state_dict(loop.training.state_dict())
    assert loop.training.scheme.cycle == 1 and all(value.isfinite().all() for value in net.state_dict().values())
