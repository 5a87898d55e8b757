"""examples/ as starting points: each says what RePr did, prints a metric, and resumes in the sub-network phase."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_same_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from repr_det import RePrSchedule
from repr_det.datasets import CLASS_NAMES

EXAMPLES = ROOT / "examples"
WITHOUT_DETECTRON2 = """
import runpy, sys
sys.modules.update(dict.fromkeys("detectron2 fvcore cv2 pycocotools yaml torchvision".split()))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def example(name: str, needs: str) -> SimpleNamespace:
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) < 60
    return SimpleNamespace(**runpy.run_path(str(file)))


@pytest.fixture
def told(caplog):
    caplog.set_level("INFO", "repr_det")

    def events() -> list[tuple[str, int]]:
        assert "a copy of the model" not in caplog.text  # an average that RePr was not given
        return [(event, int(step)) for event, step in re.findall(r"RePr (\w+) after iteration (\d+)", caplog.text)]

    return events


def assert_stopped_in_the_sub_network(file: Path, steps: int) -> None:
    state = torch.load(file, weights_only=True)
    state = state.get("repr", state)
    assert state["steps"] == steps and any(mask.any() for mask in state["scheme"]["masks"].values())


def test_quickstart_without_detectron2():
    command = [sys.executable, "-c", WITHOUT_DETECTRON2, str(EXAMPLES / "quickstart.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RePr drop after") == done.stderr.count("RePr restore after") == 3
    assert float(re.search(r"test accuracy ([\d.]+) %", done.stdout).group(1)) > 80


def test_widening(told, capsys):
    widening = example("widening", "sklearn")
    torch.manual_seed(0)
    small = widening.network(8)
    widening.train(small, 60)
    wide = widening.widened(small, 4)
    torch.testing.assert_close(wide(widening.images), small(widening.images))
    widening.train(wide, 80, with_repr=True)
    assert told() == [("drop", 1), ("restore", 2), ("drop", 4), ("restore", 5), ("drop", 7), ("restore", 8)]
    accuracies = re.findall(r"test accuracy ([\d.]+) %", capsys.readouterr().out)
    assert len(accuracies) == 2 and all(float(one) > 40 for one in accuracies)


def of_timm(file: Path) -> nn.Module:
    return example("timm_training", "timm").train(file, "test_resnet", steps=12, save_every=8)


def of_torchvision(file: Path) -> nn.Module:
    torch.manual_seed(0)
    small = dict(min_size=64, max_size=64, rpn_pre_nms_top_n_train=40, rpn_post_nms_top_n_train=20)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES) + 1, **small
    )
    detection = example("torchvision_detection", "torchvision")
    return detection.train(model.train(), file, ["backbone.body.?.block.0.0"], steps=12, save_every=8)


@pytest.mark.parametrize(
    ("train", "says"), [(of_timm, "test accuracy of the average"), (of_torchvision, "step 11: loss")]
)
def test_a_loop_that_is_stopped_ends_with_the_same_weights(train, says, tmp_path, told, capsys):
    file = tmp_path / "state.pth"
    wanted = train(file).state_dict()
    assert_stopped_in_the_sub_network(file, 8)
    assert told()[-1] == ("restore", 8) and says in capsys.readouterr().out
    assert_same_weights(train(file).state_dict(), wanted)
    assert "step 7: loss" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback(tmp_path, told):
    script = example("lightning_callback", "lightning")
    lightning = script.lightning
    images = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(images, torch.arange(200) % 10), 50)  # 4 steps an epoch

    def fit(callback, resume=None, stop=12) -> nn.Module:
        lightning.seed_everything(0, verbose=False)
        quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        keep_all = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        early = lightning.pytorch.callbacks.LambdaCallback(  # as EarlyStopping does
            on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", trainer.global_step == stop)
        )
        model, callbacks = script.Digits(), [keep_all, early, callback]
        lightning.Trainer(max_epochs=3, callbacks=callbacks, **quiet).fit(model, data, ckpt_path=resume)
        return model

    def made() -> Any:
        return script.RePrCallback(layers=["net.*"], schedule=RePrSchedule(3, 2, 2))  # out in steps 3, 4, 8 and 9

    wanted = fit(made()).state_dict()
    first = tmp_path / "epoch=0.ckpt"
    saved = torch.load(first, weights_only=False)
    (state,) = [value for key, value in saved["callbacks"].items() if "RePrCallback" in key]
    assert saved["state_dict"]["net.0.weight"][state["scheme"]["masks"]["net.0"]].count_nonzero() == 0
    assert_same_weights(fit(made(), resume=first).state_dict(), wanted)
    early = made()
    model = fit(early, stop=4)
    assert early.repr.phase == "full" and model.net[0].weight.flatten(1).any(1).all()
    torch.save(saved | {"callbacks": {}}, first)
    late = made()
    fit(late, resume=first)
    assert late.repr.steps == 12 and told()[-2:] == [("drop", 7), ("restore", 9)]


@pytest.mark.filterwarnings("ignore")
def test_huggingface_rtdetr(tmp_path, told, capsys, monkeypatch):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    rtdetr = example("huggingface_rtdetr", "transformers")
    # The folder of Detectron2's data, in the folder of the tests, looks like the package to transformers.
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)

    def train() -> tuple[Any, nn.Module]:
        one = rtdetr.RePrCallback(layers=["model.backbone.*"], schedule=RePrSchedule(2, 2, 1, 1))  # out in steps 3, 4
        return one, rtdetr.train(str(tmp_path), one, steps=6, save_steps=4)

    _, wanted = train()
    assert told() == [("drop", 2), ("restore", 4)] and "loss in evaluation" in capsys.readouterr().out
    assert_stopped_in_the_sub_network(tmp_path / "checkpoint-4" / "repr.pt", 4)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert_same_weights(train()[1].state_dict(), wanted.state_dict())
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-4" / "repr.pt").unlink()
    late, _ = train()
    assert late.repr.steps == 6 and late.repr.phase == "full"


@pytest.mark.filterwarnings("ignore")
def test_ultralytics_yolo(tmp_path, told, capsys, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    yolo = example("ultralytics_yolo", "ultralytics")
    options = dict(layers=["model.?.*"], schedule=RePrSchedule(3, 3, 1))  # 4 steps an epoch; out in steps 3 to 5

    def stop(self, trainer):
        save(self, trainer)
        raise InterruptedError

    save = yolo.RePrCallbacks.save
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(yolo.RePrCallbacks, "save", stop)
        yolo.train(tmp_path, 2, **options)
    assert_stopped_in_the_sub_network(tmp_path / "run" / "weights" / "repr.pt", 4)
    done = yolo.train(tmp_path, 2, **options)
    assert done.steps == 8 and told() == [("drop", 2), ("restore", 5)]
    assert "mAP50" in capsys.readouterr().out
