"""The warning before the first step of a run that fine-tunes a trained backbone for few iterations."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_hook import SCHEDULE, trained

from repr_det import RePr, Trainer
from repr_det.commands.arguments import build_config
from repr_det.detectron.config import options_of_config
from repr_det.detectron.hook import ADVICE, SHORT, fine_tuning_warning
from repr_det.method.passes import TrainingPasses

BACKBONE, FPN = "backbone.bottom_up.res3.0.conv1", "backbone.fpn_output2"
C4 = "roi_heads.res5.0.conv1"  # from the same weights as the backbone


@pytest.mark.parametrize(
    ("weights", "iterations", "epochs", "spares", "names", "loud", "warns"),
    [
        ("x.pkl", 800, 12.0, False, [BACKBONE], [], True),
        ("x.pkl", 800, 12.0, False, [FPN, C4], [FPN, C4], True),
        ("x.pkl", SHORT - 1, None, False, [BACKBONE], [BACKBONE], True),
        ("x.pkl", SHORT, None, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 90_000, 12.2, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 90_000, 1.5, False, [BACKBONE], [BACKBONE], True),  # the same schedule with 2 images a batch
        ("", 800, 12.0, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 800, 12.0, False, [FPN, "roi_heads.box_head.conv1"], [FPN], False),
        ("x.pkl", 800, 12.0, True, [FPN, BACKBONE], [FPN], False),
        ("x.pkl", 800, 12.0, True, [BACKBONE], [BACKBONE], True),
    ],
)
def test_who_is_warned(weights, iterations, epochs, spares, names, loud, warns):
    layers = [SimpleNamespace(name=name) for name in names]
    criterion, options = SimpleNamespace(spares=spares), SimpleNamespace(drop_ratio=0.3)
    scheme = SimpleNamespace(layers=layers, loud=loud, criterion=criterion, options=options)
    warning = fine_tuning_warning(weights, iterations, epochs, scheme)
    assert (warning is not None) == warns
    if warns:
        length = f"{iterations} iterations" if epochs is None else f"{iterations} iterations ({epochs:.3g} epochs)"
        assert f"{length} from trained weights (x.pkl)" in warning and ADVICE in warning
        assert "30 % of the filters of 1 trained convs" in warning


def test_one_warning_before_the_first_step_and_none_on_resume(tiny_cfg, tmp_path, caplog):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "trained.pth")
    keys = *SCHEDULE, "MODEL.WEIGHTS", tmp_path / "trained.pth", "DATASETS.TEST", "()"
    with caplog.at_level(logging.WARNING, "repr_det.hook"):
        trained(Trainer, tiny_cfg(*keys))
        assert caplog.text.count(ADVICE) == 1
        trained(Trainer, tiny_cfg(*keys, "SOLVER.MAX_ITER", 10), resume=True)
    assert caplog.text.count(ADVICE) == 1


def test_in_the_form_for_fine_tuning_no_conv_returns_loud():
    """Of a stock model, FrozenBN and all, at a quarter of its width: conv1 and conv2 of res3 to res5 take part, and
    nobody is warned."""
    quick = "MODEL.DEVICE cpu MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32 SOLVER.STEPS ()"
    quick += " MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.FPN.OUT_CHANNELS 8 SOLVER.MAX_ITER 800"
    cfg = build_config(str(ROOT / "configs/repr_r50_fpn_redundant.yaml"), [*quick.split(), "MODEL.WEIGHTS", ""])
    options = vars(options_of_config(cfg))
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    boxes, classes = Boxes(torch.tensor([[4.0, 4, 20, 20]])), torch.tensor([0])
    instances = Instances((32, 32), gt_boxes=boxes, gt_classes=classes)
    image = {"image": torch.rand(3, 32, 32), "height": 32, "width": 32, "instances": instances}
    passes = TrainingPasses(model, lambda number, cycle: [[image]], lambda batch: sum(model(batch).values()))
    names = [name for name, _ in model.named_modules() if re.fullmatch(r".*res[345]\.\d+\.conv\d", name)]
    assert len(names) == 3 * 13
    for exclude, convs, loud in ((options["exclude"], "12", ""), ([], "123", "3")):
        found = RePr(model, optimizer, 800, **options | {"exclude": exclude}, passes=passes)
        with EventStorage(0):
            found.prove(lambda: passes.loss([image]))
        assert {x.name for x in found.scheme.layers} == {name for name in names if name[-1] in convs}
        assert set(found.scheme.loud) == {name for name in names if name[-1] in loud}
        assert (fine_tuning_warning("x.pkl", 800, 12.0, found.scheme) is not None) == bool(loud)
        found.close()
