"""RePrHook in real Detectron2 trainers: stock behaviour when off (invariant 6), place, log, resume, schedule (8)."""

import itertools
import json
import math

import pytest
import torch
from conftest import R18, At, assert_same_weights, interrupt
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from repr_det import RePrHook, Trainer, UserError
from repr_det.commands.processes import STOCK_CONFIG_FILE, write_configs
from repr_det.detectron.config import without_repr

SCHEDULE = "SOLVER.MAX_ITER 8 REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 1 REPR.NUM_CYCLES 2".split()
BACKBONE_FILTERS = 2 * (4 * 64 + 4 * 128 + 4 * 256 + 4 * 512) // 2  # ResNet-18: four 3x3 convs a stage


def trained(trainer_class, cfg, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "opts",
    [
        ["REPR.ENABLED", "False"],
        ["REPR.ENABLED", "True", "REPR.START_ITER", "4", "REPR.S1_ITERS", "1", "REPR.S2_ITERS", "1"],
    ],
    ids=["off", "before the first drop"],
)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_changes_nothing_bit_for_bit(tiny_cfg, tmp_path, opts, norm):
    common = ["MODEL.RESNETS.NORM", norm, "SOLVER.BASE_LR", "0.0005", "REPR.NUM_CYCLES", "1", "DATASETS.TEST", "()"]
    cfg = tiny_cfg("SOLVER.MAX_ITER", 7, *common, *opts)
    stock_cfg = without_repr(tiny_cfg("SOLVER.MAX_ITER", 7, *common, "OUTPUT_DIR", tmp_path / "stock"))

    class Probe(HookBase):
        def after_step(self):
            if self.trainer.iter == 3:
                self.weights = {k: v.clone() for k, v in self.trainer.model.state_dict().items()}

    def weights_after_4(cls, cfg):
        seed_all_rng(cfg.SEED)
        trainer = cls(cfg)
        probe = Probe()
        trainer.register_hooks([probe])
        trainer.train()
        return probe.weights

    ours, stock = weights_after_4(Trainer, cfg), weights_after_4(DefaultTrainer, stock_cfg)
    assert_same_weights(ours, stock)


def test_drops_restores_events_and_scalars(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*R18, *SCHEDULE, "TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 3)
    seen = {}

    class Watch(HookBase):
        def after_step(self):
            layer = dict(self.trainer.model.named_modules())["backbone.bottom_up.res3.0.conv1"]
            zero = (layer.weight.flatten(1) == 0).all(1)
            assert torch.equal(zero, (layer.norm.weight == 0) & (layer.norm.bias == 0))
            seen[self.trainer.iter] = int(zero.sum())

    seed_all_rng(1)
    trainer = Trainer(cfg)
    trainer.register_hooks([Watch()])
    trainer.train()
    order = [type(h) for h in trainer._hooks]
    assert order.index(hooks.LRScheduler) < order.index(RePrHook) < order.index(hooks.PeriodicCheckpointer)
    assert [seen[i] > 0 for i in range(8)] == [False, True, False, False, True, False, False, False]

    events = [json.loads(line) for line in (tmp_path / "run" / "repr_events.jsonl").read_text().splitlines()]
    assert [(e["iteration"], e["event"], e["cycle"]) for e in events] == [
        (1, "drop", 0),
        (2, "restore", 0),
        (4, "drop", 1),
        (5, "restore", 1),
    ]
    slim = events[1].pop("slim")  # what the first sub-network found out
    assert set(slim) == {"slim", "by", "slim_cost", "masked_cost"} and slim["by"] == "count"
    for event in events:
        assert sum(len(v) for v in event["dropped"].values()) == math.floor(0.3 * BACKBONE_FILTERS)
        assert set(event) == {
            "iteration", "event", "cycle", "dropped", "overlap_before", "overlap_after", "max_cosine", "seconds"
        }  # fmt: skip
    # 3x3 convs with at least 64 inputs have room for orthogonal filters where the cap leaves it: d = 576 >= J + M.
    assert events[1]["max_cosine"]["backbone.bottom_up.res2.0.conv1"] <= 1e-5
    assert events[1]["overlap_after"] < events[0]["overlap_before"]

    storage = trainer.storage.histories()
    assert [v for v, _ in storage["repr/phase"].values()] == [0, 0, 1, 0, 0, 1, 0, 0]
    dropped = math.floor(0.3 * BACKBONE_FILTERS)
    assert [v for v, _ in storage["repr/dropped_filters"].values()] == [0, 0, dropped, 0, 0, dropped, 0, 0]


def test_sub_network_checkpoint_is_a_stock_checkpoint(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*R18, *SCHEDULE, "SOLVER.CHECKPOINT_PERIOD", 2)  # after iteration 1, the drop
    trained(Trainer, cfg)
    path = tmp_path / "run" / "model_0000001.pth"
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"model", "trainer", "iteration"}
    stock = build_model(without_repr(cfg))
    assert saved["model"].keys() == stock.state_dict().keys()
    leftover = DetectionCheckpointer(stock).load(str(path))
    assert set(leftover) <= {"trainer", "iteration"}
    weights = stock.backbone.bottom_up.res5[1].conv1.weight
    masks = saved["trainer"]["hooks"]["RePrHook"]["scheme"]["masks"]
    assert torch.count_nonzero(weights[masks["backbone.bottom_up.res5.1.conv1"]]) == 0
    stock.eval()
    with torch.no_grad():
        assert len(stock([{"image": torch.zeros(3, 64, 64)}])) == 1


def test_stock_config_beside_the_run_is_read_by_stock_detectron2(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*SCHEDULE)
    write_configs(cfg, tmp_path)
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / STOCK_CONFIG_FILE))
    assert "REPR" not in stock and stock.SOLVER.MAX_ITER == 8


class Reseed(HookBase):
    """Makes an iteration a function of its number alone."""

    def before_step(self):
        torch.manual_seed(self.trainer.iter)


def simple_run(cfg, batches, stop=None, resume=False):
    seed_all_rng(3)
    model = build_model(cfg)
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    trainer = SimpleTrainer(model.train(), None, optimizer)
    trainer.max_iter = cfg.SOLVER.MAX_ITER
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=trainer)
    trainer.register_hooks([Reseed(), hooks.PeriodicCheckpointer(checkpointer, 1), RePrHook(cfg)])
    start = 0
    if resume:
        start = checkpointer.resume_or_load("", resume=True)["iteration"] + 1
        seed_all_rng(12345)
    trainer.data_loader = batches  # calibration reads it from its beginning
    trainer._data_loader_iter_obj = iter(batches[start:])

    trainer.register_hooks([At(stop, interrupt)])
    try:
        trainer.train(start, cfg.SOLVER.MAX_ITER)
    except KeyboardInterrupt:
        pass
    return model


@pytest.mark.parametrize("stop", [2, 4], ids=lambda s: f"after {s}")
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_registered_alone_in_a_simple_trainer_and_resumed_bit_for_bit(tiny_cfg, tmp_path, norm, stop):
    opts = [*SCHEDULE, "MODEL.RESNETS.NORM", norm, "SOLVER.BASE_LR", "0.001", "SOLVER.IMS_PER_BATCH", "1"]
    batches = list(zip(range(8), DefaultTrainer.build_train_loader(tiny_cfg(*opts)), strict=False))
    batches = [batch for _, batch in batches]
    straight = simple_run(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "a"), batches)
    cfg = tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "b")
    simple_run(cfg, batches, stop=stop)
    resumed = simple_run(cfg, batches, resume=True)
    assert_same_weights(straight.state_dict(), resumed.state_dict())
    a, b = (
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / x / "repr_events.jsonl").read_text().splitlines()]
        for x in "ab"
    )
    assert a == b


@pytest.mark.parametrize(
    ("opts", "fragment"),
    [
        (["SOLVER.MAX_ITER", "6"], "= 6 iterations and then some of the full network, but SOLVER.MAX_ITER is 6"),
        (["REPR.S2_ITERS", "0"], "set both, or leave both 0"),
        (["REPR.DROP_RATIO", "1.3"], "REPR.DROP_RATIO must be in (0, 1), got 1.3"),
        (["REPR.MAX_DROP_PER_LAYER", "0.1"], "REPR.MAX_DROP_PER_LAYER must be at least REPR.DROP_RATIO 0.3, got 0.1"),
        (["REPR.CRITERION", "orto"], "REPR.CRITERION must be one of"),
        (["REPR.LAYERS.INCLUDE", "['nothing*']"], "matches no trainable Conv2d"),
        (["REPR.NUM_CYCLES", "0"], "REPR.NUM_CYCLES must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_config_is_refused_before_the_first_step(tiny_cfg, opts, fragment):
    cfg = tiny_cfg(*SCHEDULE, *opts)
    with pytest.raises(UserError) as error:
        trainer = Trainer(cfg)
        trainer.train()
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_resume_with_another_schedule_or_arm_is_refused(tiny_cfg):
    trained(Trainer, tiny_cfg(*SCHEDULE, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"))
    other = Trainer(tiny_cfg(*SCHEDULE, "REPR.S1_ITERS", "3", "SOLVER.MAX_ITER", "12"))
    with pytest.raises(UserError, match=r"trained with REPR.S1_ITERS 2, this run has 3"):
        other.resume_or_load(resume=True)
    baseline = Trainer(tiny_cfg("SOLVER.MAX_ITER", "8"))
    with pytest.raises(UserError, match="trained with RePr on, this run has it off"):
        baseline.resume_or_load(resume=True)


def test_reference_world_size_scales_the_schedule(tiny_cfg):
    cfg = tiny_cfg(*SCHEDULE, "SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4", "REPR.START_ITER", "1")
    hook = RePrHook(cfg)
    assert (hook.schedule.start_iter, hook.schedule.s1_iters, hook.schedule.s2_iters) == (2, 4, 2)
    assert Trainer(cfg).cfg.SOLVER.MAX_ITER == 16


def test_extra_passes_leave_no_trace_in_the_log(tiny_cfg):
    cfg = tiny_cfg(*SCHEDULE, "REPR.CRITERION", "taylor", "REPR.CRITERION_BATCHES", "2", "DATASETS.TEST", "()")
    logged = trained(Trainer, cfg).storage.histories()
    assert {len(logged[name].values()) for name in ("rpn/num_pos_anchors", "total_loss")} == {8}


def test_a_network_that_diverges_is_named_as_such_at_a_transition(tiny_cfg):
    """Weights that are finite and whose boxes are not: Detectron2 raises FloatingPointError, here between two steps."""

    class Blow(HookBase):
        def after_step(self):
            if self.trainer.iter == 1:
                self.trainer.model.proposal_generator.rpn_head.anchor_deltas.weight.data.fill_(3e38)

    trainer = Trainer(tiny_cfg(*SCHEDULE, "REPR.CRITERION", "redundant", "DATASETS.TEST", "()"))
    trainer.register_hooks([Blow()])
    trainer._hooks.insert(0, trainer._hooks.pop())
    with pytest.raises(UserError, match=r"that a transition looks at: .* has diverged\. Lower the") as error:
        trainer.train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("size", "batches", "images"), [(2, 0, 8), (3, 0, 9), (10, 0, 10), (2, 3, 6)])
def test_calibration_of_frozen_bn_looks_at_eight_images_or_at_the_batches_it_is_told(tiny_cfg, size, batches, images):
    keys = {"MODEL.RESNETS.NORM": "FrozenBN", "SOLVER.IMS_PER_BATCH": size, "REPR.REINIT.CALIBRATION_BATCHES": batches}
    cfg = tiny_cfg(*SCHEDULE, *itertools.chain(*keys.items()), "DATASETS.TEST", "()")
    seen = []
    trainer = Trainer(cfg)
    trainer.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer.train()
    assert sum(seen) == 8 * size + 2 * 2 * images  # the steps; a drop and a restore in each of two cycles
