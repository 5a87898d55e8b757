"""The worst share over the network under a per-layer cap, against a loop that takes one filter after the other."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch

from repr_det.method.criteria import select_filters
from repr_det.method.errors import UserError

NEVER = float("-inf")


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
    with pytest.raises(UserError) as error:
        select_filters({str(i): torch.ones(size) for i, size in enumerate(sizes)}, ratio, cap)
    assert told in str(error.value)


def test_scores_that_are_not_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"filter 2 of res4\.0\.conv1 is NaN"):
        select_filters({"res3": torch.ones(4), "res4.0.conv1": torch.tensor([1, 2, float("nan")])}, 0.3, 0.5)
