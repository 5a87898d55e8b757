"""The options are described once: keyword arguments, config keys, what a resume compares and errors follow from it."""

import io
import re

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from omegaconf import OmegaConf
from option_table import markdown_table
from plain_nets import readable_net

from repr_det import RePr, RePrHook, UserError, add_repr_config
from repr_det.commands.lazy import repr_cfg_from_lazy
from repr_det.detectron.config import options_of_config
from repr_det.method.errors import OptionError, spelling
from repr_det.method.options import CONFIG_KEYS, RePrOptions, about_option, check_resumed, option_names

OTHERS = {
    "s1_iters": 3, "s2_iters": 2, "num_cycles": 1, "start_iter": 2, "drop_ratio": 0.2, "max_drop_per_layer": 0.7,
    "criterion": "random", "criterion_batches": 3, "layers": ["0"], "exclude": ["3"], "scale": "old",
    "frozen_norm": "keep", "calibration_batches": 2, "returns": "function_preserving", "warmup_iters": 5,
}  # fmt: skip
PAIRS = {"s1_iters": {"s2_iters": 4}, "s2_iters": {"s1_iters": 6}}  # set together


def built(**options) -> RePr:
    net = readable_net()
    return RePr(net, torch.optim.SGD(net.parameters(), 0.1), 40, **options)


@pytest.mark.parametrize("name", option_names())
def test_a_run_is_resumed_with_the_same_options_alone(name):
    rest = PAIRS.get(name, {})
    mine = built(**({"s1_iters": 6, "s2_iters": 4} if rest else {}))
    built().load_state_dict(built().state_dict())
    with pytest.raises(UserError, match=rf"trained with (RePrSchedule\(|{name}= )[^\n]*$"):
        built(**{name: OTHERS[name]} | rest).load_state_dict(mine.state_dict())


def test_options_of_subclasses_are_saved_as_plain_ones():
    """torch.load with weights_only=True refuses NumPy's."""
    file = io.BytesIO()
    torch.save(built(drop_ratio=np.float64(0.2), layers=[np.str_("0")], scale=np.str_("old")).state_dict(), file)
    file.seek(0)
    built(drop_ratio=0.2, layers=["0"], scale="old").load_state_dict(torch.load(file, weights_only=True))


def test_states_without_an_option_are_taken():
    """Earlier versions did not have it, or did not save any."""
    saved = RePrOptions().resumed()
    del saved["REPR.DROP_RATIO"]
    check_resumed(saved, RePrOptions(drop_ratio=0.1).resumed())
    check_resumed({}, RePrOptions(drop_ratio=0.1).resumed())
    with pytest.raises(OptionError, match=r"^the checkpoint was trained with scale= kept, this run has old"):
        check_resumed(saved, RePrOptions(scale="old").resumed())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"s1_iters": -1}, "{s1_iters} must be an integer of at least 0, got -1"),
        ({"s1_iters": 3}, "{s1_iters} is 3, {s2_iters} 0: set both, or leave both 0"),
        ({"num_cycles": 2.5}, "{num_cycles} must be an integer of at least 1, got 2.5"),
        ({"num_cycles": True}, "{num_cycles} must be an integer of at least 1, got True"),
        ({"drop_ratio": 0}, "{drop_ratio} must be in (0, 1), got 0"),
        ({"drop_ratio": 1.0}, "{drop_ratio} must be in (0, 1), got 1.0"),
        ({"drop_ratio": "0.3"}, "{drop_ratio} must be in (0, 1), got '0.3'"),
        ({"max_drop_per_layer": 1.1}, "{max_drop_per_layer} must be in (0, 1], got 1.1"),
        ({"max_drop_per_layer": 0.2}, "{max_drop_per_layer} must be at least {drop_ratio} 0.3, got 0.2"),
        ({"scale": "big"}, "{scale} must be one of kept, old, unit, got 'big'"),
        ({"warmup_iters": -2}, "{warmup_iters} must be an integer of at least -1, got -2"),
    ],
)
def test_errors_name_what_was_written(given, message):
    for names in (None, CONFIG_KEYS):
        with pytest.raises(OptionError) as error, spelling(names):
            RePrOptions(**given)
        assert str(error.value) == message.format_map(names or {name: f"{name}=" for name in option_names()})


def test_braces_that_a_user_typed_stay_what_they_are():
    for typed in ("{conv1,conv2}.*", "{", "}{", "{0}"):
        with pytest.raises(OptionError) as error, spelling(CONFIG_KEYS):
            raise OptionError(f"{{layers}} {typed} matches nothing")
        assert str(error.value) == f"REPR.LAYERS.INCLUDE {typed} matches nothing"


@pytest.mark.parametrize("name", option_names())
def test_an_option_is_described_once(name):
    """What is written elsewhere follows: keyword, default and key of a config, LazyConfig, table of the pages."""
    cfg = get_cfg()
    add_repr_config(cfg)
    default = getattr(options_of_config(cfg), name)
    assert about_option(name).in_config is not None or default == getattr(RePrOptions(), name)
    pair = PAIRS.get(name, {}) | {name: OTHERS[name]}
    cfg.merge_from_list([part for one, value in pair.items() for part in (CONFIG_KEYS[one], value)])
    assert getattr(options_of_config(cfg), name) == getattr(RePrHook(**pair).options, name) == OTHERS[name]
    lazy = OmegaConf.create({"train": {"max_iter": 100}, "repr": {"_target_": "repr_det.RePrHook", **pair}})
    assert repr_cfg_from_lazy(lazy).REPR == cfg.REPR | {"ENABLED": True}
    row = rf"^\| `{CONFIG_KEYS[name]}` \| `{name}` \| `{re.escape(repr(default))}` \|"
    assert re.search(row, markdown_table(), re.M)
