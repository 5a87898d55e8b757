"""The warning before the first step of a run that fine-tunes a trained backbone for few iterations."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from test_hook import SCHEDULE, trained

from repr_det import Trainer
from repr_det.detectron.fine_tuning import MEASURED, SHORT, fine_tuning_warning

BACKBONE, FPN = "backbone.bottom_up.res3.0.conv1", "backbone.fpn_output2"


@pytest.mark.parametrize(
    ("weights", "iterations", "names", "warns"),
    [
        ("x.pkl", 800, [BACKBONE], True),
        ("x.pkl", 800, ["roi_heads.res5.0.conv1"], True),  # of a C4 model, from the same weights as the backbone
        ("x.pkl", 800, [FPN, BACKBONE], True),
        ("x.pkl", SHORT - 1, [BACKBONE], True),
        ("x.pkl", SHORT, [BACKBONE], False),
        ("", 800, [BACKBONE], False),
        ("x.pkl", 800, [FPN, "proposal_generator.rpn_head.conv", "roi_heads.box_head.conv1"], False),
    ],
)
def test_who_is_warned(tiny_cfg, weights, iterations, names, warns):
    cfg = tiny_cfg("SOLVER.MAX_ITER", iterations, "MODEL.WEIGHTS", weights)
    warning = fine_tuning_warning(cfg, [SimpleNamespace(name=name) for name in names])
    assert (warning is not None) == warns
    if warns:
        assert f"{iterations} iterations from trained weights (MODEL.WEIGHTS x.pkl)" in warning and MEASURED in warning
        assert f"30 % of the filters of {sum(name != FPN for name in names)} trained convs" in warning


def test_one_warning_before_the_first_step_and_none_on_resume(tiny_cfg, tmp_path, caplog):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "trained.pth")
    cfg = tiny_cfg(*SCHEDULE, "MODEL.WEIGHTS", tmp_path / "trained.pth", "DATASETS.TEST", "()")
    with caplog.at_level(logging.WARNING, "repr_det.hook"):
        trained(Trainer, cfg)
        warnings = [record for record in caplog.records if MEASURED in record.getMessage()]
        assert len(warnings) == 1
        caplog.clear()
        longer = cfg.clone()
        longer.defrost()
        longer.SOLVER.MAX_ITER = 10
        trained(Trainer, longer, resume=True)
    assert not any(MEASURED in record.getMessage() for record in caplog.records)
