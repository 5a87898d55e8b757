"""What find_filter_layers found, or why it refused, for the tests of it."""

import pytest
from torch import nn

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers


def names(layers: list[FilterLayer]) -> list[str]:
    return [layer.name for layer in layers]


def refused(model: nn.Module, include=("*",), exclude=(), **keys) -> str:
    with pytest.raises(UserError) as error:
        find_filter_layers(model, list(include), list(exclude), **keys)
    assert "\n" not in str(error.value)
    return str(error.value)
