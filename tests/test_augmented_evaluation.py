"""TEST.AUG: the run is evaluated once more at its end, as Detectron2's own tools/train_net.py does."""

import json

import pytest
from conftest import end_of
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA

from repr_det import Trainer
from repr_det.commands import train
from repr_det.commands.arguments import train_argument_parser
from repr_det.runs.checkpoints import AtomicCheckpointer


@pytest.fixture
def augmented(tiny_cfg):
    aug = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", 96, "SOLVER.MAX_ITER", 1]
    return lambda *opts: tiny_cfg(*aug, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts)


def test_after_training_and_alone_as_stock_detectron2(augmented, tmp_path, monkeypatch):
    cfg = augmented()
    end_of(cfg)
    row = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in row
    model = Trainer.build_model(cfg)
    AtomicCheckpointer(model).load(str(tmp_path / "run" / "model_final.pth"))
    file = tmp_path / "run" / "inference" / "coco_instances_results.json"
    plain = json.loads(file.read_text())

    loader = DefaultTrainer.build_test_loader(cfg, "tiny_val")
    stock = COCOEvaluator("tiny_val", output_dir=str(tmp_path / "stock"))
    expected = inference_on_dataset(GeneralizedRCNNWithTTA(cfg, model), loader, stock)["bbox"]
    detections = json.loads((tmp_path / "stock" / "coco_instances_results.json").read_text())
    found = json.loads((tmp_path / "run" / "inference_TTA" / "coco_instances_results.json").read_text())
    assert found == detections != plain
    for key in ("AP", "AP50"):
        assert row[f"bbox_TTA/{key}"] == pytest.approx(expected[key], nan_ok=True)

    args = train_argument_parser().parse_args(["--eval-only"])
    cfg = augmented("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth")
    monkeypatch.setattr(train, "build_config", lambda *_: cfg)
    file.write_text("of the training")
    results = train.main(args)
    assert file.read_text() == "of the training"
    assert json.loads((tmp_path / "run" / "eval_only" / "inference" / file.name).read_text()) == plain
    assert results["bbox_TTA"] == pytest.approx(expected, nan_ok=True) and "bbox" in results
