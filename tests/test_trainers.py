"""The trainers people have: torchvision's detectors, Lightning, and a Detectron2 loop that is not DefaultTrainer; each
resumed in the middle of the sub-network phase to the weights of the run that was not stopped."""

import importlib.util
import itertools
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_weights
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import OmegaConf
from small_loop import TwoConvs, batch
from torch import nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.resnet import Bottleneck, ResNet

from repr_det import RePr, RePrHook, RePrSchedule, UserError
from repr_det.detectron.lazy import repr_cfg_from_lazy

EXAMPLES = ROOT / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OneLayerHead(nn.Module):
    """In place of 13 million weights: the pooled features' mean, as wide as torchvision's predictor wants it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels // 49, 1024)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def torchvision_example():
    return example("torchvision_detection")


TAKE_PART = [
    ("fasterrcnn_resnet50_fpn", 48, 22656),  # of an R50, without stem and shortcuts
    ("retinanet_resnet50_fpn", 48, 22656),
    ("ssdlite320_mobilenet_v3_large", 54, 10344),
]


@pytest.mark.parametrize(("model", "convs", "filters"), TAKE_PART)
def test_what_takes_part_in_torchvisions_detectors(torchvision_example, model, convs, filters):
    built = torchvision_example.build_model(model, 64).train()
    include, exclude = torchvision_example.MODELS[model]
    batch = torchvision_example.batches_of(torchvision_example.shapes(2), 0)[0]
    optimizer = torch.optim.SGD(built.parameters(), 0.01)
    layers = RePr(built, optimizer, 50, layers=include, exclude=exclude, sample=batch).scheme.layers
    assert len(layers) == convs and sum(layer.num_filters for layer in layers) == filters
    with_norm = [layer for layer in layers if layer.norm is not None]
    assert len({id(layer.norm) for layer in with_norm}) == len(with_norm)
    assert all(layer.norm.num_features == layer.num_filters for layer in with_norm)
    if model.startswith("ssd"):  # squeeze-and-excitation: fc1 reduces, fc2 puts out factors
        body = built.backbone.features
        named = {f"backbone.features.{n}" for n, m in body.named_modules() if isinstance(m, nn.Conv2d)}
        assert {x.name for x in layers} == {name for name in named if not name.endswith("fc2")}
        assert {x.name for x in layers if x.norm is None} == {name for name in named if name.endswith("fc1")}
    assert convs in [int(number) for number in re.findall(r"\d+", row_of_zoo(model))]


def row_of_zoo(name: str) -> str:
    (line,) = [line for line in (ROOT / "docs" / "zoo.md").read_text().splitlines() if f"`{name}`" in line]
    return line.split("|")[2]


@pytest.mark.parametrize(
    "model", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvision_detectors_resumed_in_the_sub_network(torchvision_example, monkeypatch, tmp_path, capsys, model):
    one_block_a_stage = partial(ResNet, Bottleneck, [1, 1, 1, 1])
    for module in (faster_rcnn, retinanet):
        monkeypatch.setattr(module, "resnet50", lambda norm_layer, **_: one_block_a_stage(norm_layer=norm_layer))
    monkeypatch.setattr(faster_rcnn, "TwoMLPHead", lambda channels, _: OneLayerHead(channels))
    if model.startswith("faster"):
        few = partial(torchvision_example.build_model, rpn_pre_nms_top_n_train=40, rpn_post_nms_top_n_train=20)
        monkeypatch.setattr(torchvision_example, "build_model", few)
    include, exclude = torchvision_example.MODELS[model]
    small = [x.replace("layer*", "layer[12]*").replace("features.*", "features.0.[1-6].*") for x in include]
    monkeypatch.setitem(torchvision_example.MODELS, model, (small, exclude))
    file = tmp_path / "checkpoint.pth"
    save, saved = torchvision_example.save, []
    monkeypatch.setattr(torchvision_example, "save", lambda *a: saved.append(a) or len(saved) > 1 or save(*a))

    # At 32 px the scales that MultiScaleRoIAlign takes from its first batch depend on that batch.
    # S1 2 and S2 1: steps 0 and 1 full, 2 sub, 3 full; what step 1 saves lies between drop and restore.
    options = f"--model {model} --steps 4 --cycles 1 --images 4 --size 64 --save-every 2 --checkpoint {file}".split()
    wanted = torchvision_example.main(options).state_dict()
    shown = capsys.readouterr().out
    order = [shown.index(text) for text in ("step 1", "drop of", "step 2", "restore of", "step 3")]
    assert order == sorted(order)
    state = torch.load(file, weights_only=True)["repr"]
    assert state["steps"] == 2 and any(mask.any() for mask in state["scheme"]["masks"].values())
    assert_same_weights(torchvision_example.main([*options, "--resume"]).state_dict(), wanted)
    assert "step 1:" not in capsys.readouterr().out


def test_torchvision_example_says_what_is_wrong(torchvision_example, tmp_path):
    with pytest.raises(UserError, match="--resume needs --checkpoint FILE of an earlier run, got None"):
        torchvision_example.main(["--resume"])


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    module = example("lightning_callback")
    train = module.train
    # 4 steps an epoch; the sub-network trains at steps 3, 4, 8 and 9, so the first epoch ends in its middle.
    run = partial(train, images=200, schedule=RePrSchedule(3, 2, 2), layers=["net.*"])
    wanted = run(str(tmp_path / "whole"), epochs=3).state_dict()
    checkpoint = tmp_path / "whole" / "epoch=0.ckpt"
    state = torch.load(checkpoint, weights_only=False)
    (mine,) = [value for key, value in state["callbacks"].items() if "RePrCallback" in key]
    assert mine["steps"] == 4 and any(mask.any() for mask in mine["scheme"]["masks"].values())
    dropped = mine["scheme"]["masks"]["net.0"]
    assert state["state_dict"]["net.0.weight"][dropped].count_nonzero() == 0
    assert_same_weights(run(str(tmp_path / "rest"), epochs=3, resume=str(checkpoint)).state_dict(), wanted)

    def stop(model, *_):
        model.trainer.should_stop = model.global_step >= 4

    monkeypatch.setattr(module.Digits, "on_train_batch_end", stop, raising=False)
    assert run(str(tmp_path / "stopped"), epochs=3).net[0].weight.flatten(1).any(1).all()  # as early stopping does
    state["callbacks"] = {}
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="trained without RePrCallback"):
        run(str(tmp_path / "late"), epochs=3, resume=str(tmp_path / "other.ckpt"))


# --- A Detectron2 trainer that is not DefaultTrainer, after detrex's: a loop class of its own with gradient clipping,
# an EMA hook, a LazyConfig, and a checkpointer that saves the EMA beside the model.


class LoopOfOnesOwn(SimpleTrainer):
    def __init__(self, model, dataloader, optimizer, clip_grad_params):
        super().__init__(model, dataloader, optimizer)
        self.clip_grad_params = clip_grad_params

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), **self.clip_grad_params)
        self.optimizer.step()
        self._write_metrics(losses, 0.0)


class ModelEma:
    """A checkpointable: the average's state under the key ``ema_state``."""

    def __init__(self, model):
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def state_dict(self):
        return self.average

    def load_state_dict(self, state):
        self.average = {name: value.clone() for name, value in state.items()}


class EmaHook(HookBase):
    def __init__(self, ema):
        self.ema = ema

    def after_step(self):
        for name, value in self.trainer.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.ema.average[name].lerp_(value, 0.1)


class Images:
    """Goes on where ``start`` says, which detrex's own loader does not: that is the loader's business, not RePr's."""

    def __init__(self, start):
        self.start = start

    def __iter__(self):
        for number in itertools.count(self.start):
            yield batch(number)


def lazy_config(folder):
    return OmegaConf.create(
        dict(
            model=LazyCall(TwoConvs)(channels=12),
            optimizer=LazyCall(torch.optim.AdamW)(params=LazyCall(get_default_optimizer_params)(), lr=0.01),
            train=dict(
                device="cpu",
                max_iter=8,
                output_dir=str(folder),
                seed=3,
                clip_grad=dict(params=dict(max_norm=0.1, norm_type=2)),
            ),
            repr=LazyCall(RePrHook)(s1_iters=2, s2_iters=3, num_cycles=1, layers=["backbone.conv*"]),
        ),
        flags={"allow_objects": True},
    )


def do_train(cfg, resume=False, until=None):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    images = Images(0)
    trainer = LoopOfOnesOwn(model, images, optimizer, cfg.train.clip_grad.params)
    ema = ModelEma(model)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer, ema_state=ema)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            EmaHook(ema),
            hooks.PeriodicCheckpointer(checkpointer, period=4),
            instantiate(cfg.repr) if "_target_" in cfg.repr else RePrHook(repr_cfg_from_lazy(cfg)),
        ]
    )
    checkpointer.resume_or_load("", resume=resume)
    images.start = start = trainer.iter + 1 if resume else 0
    trainer.train(start, until or cfg.train.max_iter)
    return model.state_dict(), ema.average


OLD_NODE = dict(ENABLED=True, S1_ITERS=2, S2_ITERS=3, NUM_CYCLES=1, LAYERS=dict(INCLUDE=["backbone.conv*"]))


def test_a_detectron2_loop_that_is_not_default_trainer(tmp_path):
    """Resumed with the node of version 0.2.0."""
    wanted, wanted_ema = do_train(lazy_config(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "rest", ignore=shutil.ignore_patterns("model_final.pth"))
    (tmp_path / "rest" / "last_checkpoint").write_text("model_0000003.pth")
    saved = torch.load(tmp_path / "rest" / "model_0000003.pth", weights_only=True)
    masks = saved["trainer"]["hooks"]["RePrHook"]["scheme"]["masks"]
    assert sum(int(mask.sum()) for mask in masks.values()) == 7  # floor(0.3 * 24), after iteration 3: 2 to 4 are S2
    assert saved["model"]["backbone.conv1.weight"][masks["backbone.conv1"]].count_nonzero() == 0
    rest = lazy_config(tmp_path / "rest")
    rest.repr = OLD_NODE
    found, found_ema = do_train(rest, resume=True)
    assert_same_weights(found, wanted)
    assert_same_weights(found_ema, wanted_ema)
