"""TEST.PRECISE_BN, which reads training images of its own: a resumed run goes on with the ones that come next."""

import pytest
import torch
from conftest import assert_same_weights
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from repr_det import Trainer

OPTS = (
    "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 DATASETS.TEST () "
    "SOLVER.CHECKPOINT_PERIOD 3 TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.NUM_ITER 2"
).split()


class Stop(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise InterruptedError


def state_at_the_end(cfg, resume=False, stop=None):
    seed_all_rng(99 if resume else 5)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop is None:
        trainer.train()
    else:
        trainer.register_hooks([Stop(stop)])
        with pytest.raises(InterruptedError):
            trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize(("workers", "grouping", "period"), [(0, True, 4), (2, False, 4), (2, True, 100)])
def test_resumed_before_and_after_its_first_use_bit_for_bit(tiny_cfg, tmp_path, workers, grouping, period):
    opts = [*OPTS, "DATALOADER.NUM_WORKERS", workers, "DATALOADER.ASPECT_RATIO_GROUPING", grouping]
    opts += ["TEST.EVAL_PERIOD", period]
    straight, random = state_at_the_end(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "straight"))
    cfg = tiny_cfg(*opts)
    state_at_the_end(cfg, stop=4)
    state_at_the_end(cfg, resume=True, stop=8)
    again, random_again = state_at_the_end(cfg, resume=True)
    assert_same_weights(again, straight)
    assert torch.equal(random_again, random)


def test_may_be_switched_on_by_a_resumed_run(tiny_cfg):
    state_at_the_end(tiny_cfg(*OPTS, "TEST.PRECISE_BN.ENABLED", False), stop=4)
    state_at_the_end(tiny_cfg(*OPTS), resume=True)
