"""The worst share over the network under a per-layer cap, against a loop that takes one filter after the other."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch

from repr_det.method.errors import UserError
from repr_det.method.selection import select_filters


def greedy(scores: dict[str, torch.Tensor], ratio: str, cap: str) -> dict[str, list[int]]:
    """Filters in the order (largest score, first layer, first index), each taken unless its layer is at its cap.

    Shares are decimal strings: floor and ceil are exact in fractions.
    """
    names = list(scores)
    ranked = [(-float(s), names.index(n), i) for n in names for i, s in enumerate(scores[n])]
    ranked.sort()
    total = floor(Fraction(ratio) * len(ranked))
    caps = [min(len(scores[n]) - 1, ceil(Fraction(cap) * len(scores[n]))) for n in names]
    taken = {n: [] for n in names}
    for _, layer, index in ranked:
        if sum(map(len, taken.values())) < total and len(taken[names[layer]]) < caps[layer]:
            taken[names[layer]].append(index)
    assert sum(map(len, taken.values())) == total
    return {n: sorted(v) for n, v in taken.items()}


def selected(scores, ratio, cap):
    masks = select_filters(scores, float(ratio), float(cap))
    assert list(masks) == list(scores)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == scores[name].shape
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


def network(rng: np.random.Generator, levels: int | None) -> dict[str, torch.Tensor]:
    """Layers of 2 to 40 filters; ``levels`` distinct scores (many ties) or continuous ones on different scales."""
    scores = {}
    for layer in rng.permutation(rng.integers(1, 9)):
        size = int(rng.integers(2, 41))
        values = rng.integers(0, levels, size) if levels else rng.standard_normal(size) * rng.uniform(0.1, 3)
        scores[f"layer{layer}"] = torch.tensor(values, dtype=torch.float32)
    return scores


@pytest.mark.parametrize("levels", [None, 1, 2, 5])
@pytest.mark.parametrize(
    ("ratio", "cap"), [("0.3", "0.5"), ("0.3", "0.3"), ("0.1", "1"), ("0.5", "0.5"), ("0.29", "0.29"), ("0.05", "0.07")]
)
def test_selection_is_the_greedy_one(ratio, cap, levels):
    rng = np.random.default_rng(0)
    for _ in range(40):
        scores = network(rng, levels)
        assert selected(scores, ratio, cap) == greedy(scores, ratio, cap)


@pytest.mark.parametrize(
    ("size", "ratio", "total"),
    [(10, 0.3, 3), (30, 0.1, 3), (100, 0.29, 29), (22656, 0.3, 6796), (10, 0.7, 7), (9, 0.3, 2)],
)
def test_shares_are_decimal_numbers(size, ratio, total):
    # 0.29 * 100 is 28.999999999999996 in binary, 0.1 * 30 is 3.0000000000000004.
    scores = {"a": torch.arange(float(size))}
    for cap in (1.0, ratio):
        assert selected(scores, ratio, cap)["a"] == list(range(size - total, size))


@pytest.mark.parametrize(
    ("size", "cap", "most"), [(30, 0.1, 3), (100, 0.07, 7), (10, 0.25, 3), (7, 0.5, 4), (2, 1.0, 1)]
)
def test_the_cap_rounds_up_in_decimal_numbers(size, cap, most):
    # 0.07 * 100 is 7.000000000000001 in binary.
    scores = {"worst": torch.ones(size), "good": torch.zeros(1000)}
    ratio = 2 * most / (size + 1000)
    assert len(selected(scores, ratio, max(cap, ratio))["worst"]) == most


def test_every_percentage_agrees_with_exact_arithmetic():
    for percent in range(1, 100):
        exact = Fraction(percent, 100)
        for size in (10, 64, 100, 256):
            found = select_filters({"a": torch.zeros(size)}, percent / 100, 1.0)["a"]
            assert found.sum() == min(floor(exact * size), size - 1), (percent, size)
            if percent < 2:
                continue
            # The second layer is large and good, so that only the cap limits the first.
            capped = select_filters({"a": torch.ones(size), "b": torch.zeros(49 * size)}, 0.02, percent / 100)["a"]
            assert capped.sum() == min(ceil(exact * size), size - 1), (percent, size)


def test_cap_equal_to_the_ratio_ranks_every_layer_by_itself():
    rng = np.random.default_rng(1)
    scores = {f"l{i}": torch.tensor(rng.standard_normal(size) + 10 * i) for i, size in enumerate((10, 20, 40, 80))}
    found = selected(scores, "0.3", "0.3")
    for name, score in scores.items():
        share = len(score) * 3 // 10
        assert found[name] == sorted(np.argsort(-score.numpy(), kind="stable")[:share].tolist())


def test_ties_go_by_layer_order_and_then_by_index():
    scores = {"z": torch.ones(4), "a": torch.ones(4), "m": torch.tensor([0.0, 1.0, 2.0, 1.0])}
    assert selected(scores, "0.5", "0.5") == {"z": [0, 1], "a": [0, 1], "m": [1, 2]}
    assert selected(scores, "0.5", "1") == {"z": [0, 1, 2], "a": [0, 1], "m": [2]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64], ids=str)
def test_scores_of_any_type_and_without_limits(dtype):
    scores = {"a": torch.tensor([1, 3, 2, 0, 0, 0]).to(dtype), "b": torch.tensor([5, -4, 0, 0]).to(dtype)}
    assert selected(scores, "0.3", "1") == {"a": [1, 2], "b": [0]}
    if dtype.is_floating_point:
        scores["b"][1], scores["a"][0] = float("inf"), float("-inf")
        assert selected(scores, "0.3", "1") == {"a": [1], "b": [0, 1]}


def test_scores_that_differ_only_in_double_precision_are_not_tied():
    scores = {"a": torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), "b": torch.zeros(2)}
    assert selected(scores, "0.25", "1") == {"a": [1], "b": []}


def test_one_filter_of_a_layer_always_stays():
    scores = {"single": torch.tensor([9.0]), "pair": torch.tensor([8.0, 7.0]), "rest": torch.zeros(7)}
    assert selected(scores, "0.5", "1") == {"single": [], "pair": [0], "rest": [0, 1, 2, 3]}


def test_fewer_filters_than_one_share_drop_nothing():
    assert selected({"a": torch.ones(3)}, "0.3", "0.5") == {"a": []}


def test_scores_and_their_order_are_left_alone():
    scores = {"b": torch.randn(6, generator=torch.Generator().manual_seed(0)), "a": torch.ones(4)}
    before = {n: s.clone() for n, s in scores.items()}
    select_filters(scores, 0.3, 0.5)
    assert list(scores) == ["b", "a"] and all(torch.equal(scores[n], before[n]) for n in scores)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.3, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(UserError, match=rf"^drop_ratio= must be in \(0, 1\), got {ratio}$"):
        select_filters({"a": torch.ones(10)}, ratio, 0.5)


@pytest.mark.parametrize("cap", [0.0, -0.5, 1.01, float("nan")])
def test_cap_out_of_range(cap):
    with pytest.raises(UserError, match=rf"^max_drop_per_layer= must be in \(0, 1\], got {cap}$"):
        select_filters({"a": torch.ones(10)}, 0.3, cap)


def test_cap_that_leaves_too_few_filters_is_refused():
    scores = {"a": torch.ones(10), "b": torch.ones(20)}
    with pytest.raises(
        UserError, match=r"^max_drop_per_layer= 0.2 lets 6 of 30 filters be dropped, drop_ratio= 0.3 needs 9"
    ):
        select_filters(scores, 0.3, 0.2)
    with pytest.raises(UserError, match=r"lets 0 of 10 filters be dropped, .* needs 3 \(one filter .* always stays\)"):
        select_filters({str(i): torch.ones(1) for i in range(10)}, 0.3, 1.0)


def test_scores_that_are_not_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"filter 2 of res4\.0\.conv1 is NaN"):
        select_filters({"res3": torch.ones(4), "res4.0.conv1": torch.tensor([1, 2, float("nan")])}, 0.3, 0.5)


def test_minus_infinity_is_never_dropped():
    never = float("-inf")
    scores = {"a": torch.tensor([1.0, never, never, 2.0]), "b": torch.full((4,), never), "c": torch.ones(4)}
    assert selected(scores, "0.5", "1") == {"a": [0, 3], "b": [], "c": [0, 1, 2]}
    assert selected(scores, "0.5", "0.5") == {"a": [0, 3], "b": [], "c": [0, 1]}
    assert selected({"b": scores["b"]}, "0.5", "0.5") == {"b": []}
