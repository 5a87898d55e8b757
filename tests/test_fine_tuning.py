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
NEW = [FPN, "proposal_generator.rpn_head.conv", "roi_heads.box_head.conv1"]


@pytest.mark.parametrize(
    ("weights", "iterations", "epochs", "spares", "names", "loud", "warns"),
    [
        ("x.pkl", 800, 12.0, False, [BACKBONE], [BACKBONE], True),
        ("x.pkl", 800, 12.0, False, [BACKBONE], [], True),
        ("x.pkl", 800, 12.0, False, [C4], [C4], True),
        ("x.pkl", 800, 12.0, False, [FPN, BACKBONE], [FPN, BACKBONE], True),
        ("x.pkl", SHORT - 1, None, False, [BACKBONE], [BACKBONE], True),
        ("x.pkl", SHORT, None, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 90_000, 12.2, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 90_000, 1.5, False, [BACKBONE], [BACKBONE], True),  # the same schedule with 2 images a batch
        ("", 800, 12.0, False, [BACKBONE], [BACKBONE], False),
        ("x.pkl", 800, 12.0, False, NEW, NEW, False),
        ("x.pkl", 800, 12.0, True, [BACKBONE], [], False),
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
        assert f"30 % of the filters of {sum(name != FPN for name in names)} trained convs" in warning


def test_one_warning_before_the_first_step_and_none_on_resume(tiny_cfg, tmp_path, caplog):
    torch.save({"model": build_model(tiny_cfg()).state_dict()}, tmp_path / "trained.pth")
    cfg = tiny_cfg(*SCHEDULE, "MODEL.WEIGHTS", tmp_path / "trained.pth", "DATASETS.TEST", "()")
    with caplog.at_level(logging.WARNING, "repr_det.hook"):
        trained(Trainer, cfg)
        warnings = [record for record in caplog.records if ADVICE in record.getMessage()]
        assert len(warnings) == 1
        caplog.clear()
        longer = cfg.clone()
        longer.defrost()
        longer.SOLVER.MAX_ITER = 10
        trained(Trainer, longer, resume=True)
    assert not any(ADVICE in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("depth", [50, 101])
def test_in_the_form_for_fine_tuning_no_conv_returns_loud(depth):
    """Of stock models, FrozenBN and all, at a quarter of their width: conv1 and conv2 of res3 to res5 take part, and
    nobody is warned."""
    quick = "MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 32"
    quick += " MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.FPN.OUT_CHANNELS 8 SOLVER.STEPS () SOLVER.MAX_ITER 800"
    cfg = build_config(str(ROOT / f"configs/repr_r{depth}_fpn_redundant.yaml"), quick.replace("''", "").split(" "))
    options = vars(options_of_config(cfg))
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    boxes, classes = Boxes(torch.tensor([[4.0, 4, 20, 20]])), torch.tensor([0])
    instances = Instances((32, 32), gt_boxes=boxes, gt_classes=classes)
    image = {"image": torch.rand(3, 32, 32), "height": 32, "width": 32, "instances": instances}
    passes = TrainingPasses(model, lambda number, cycle: [[image]], lambda batch: sum(model(batch).values()))
    names = [name for name, _ in model.named_modules() if re.fullmatch(r".*res[345]\.\d+\.conv\d", name)]
    assert len(names) == 3 * (13 if depth == 50 else 30)
    for exclude, convs, loud in ((options["exclude"], "12", ""), ([], "123", "3")):
        found = RePr(model, optimizer, 800, **options | {"exclude": exclude}, passes=passes)
        with EventStorage(0):
            found.prove(lambda: passes.loss([image]))
        assert {x.name for x in found.scheme.layers} == {name for name in names if name[-1] in convs}
        assert set(found.scheme.loud) == {name for name in names if name[-1] in loud}
        assert (fine_tuning_warning("x.pkl", 800, 12.0, found.scheme) is not None) == bool(loud)
        found.close()
