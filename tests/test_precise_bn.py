"""TEST.PRECISE_BN, which reads training images of its own: a resumed run goes on with the ones that come next."""

import pytest
import torch
from conftest import At, assert_same_weights, end_of, interrupt

OPTS = "SOLVER.MAX_ITER 12 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 DATASETS.TEST ()".split()
OPTS += "SOLVER.CHECKPOINT_PERIOD 3 TEST.PRECISE_BN.ENABLED True TEST.PRECISE_BN.NUM_ITER 2".split()


@pytest.mark.parametrize(("workers", "grouping", "period"), [(0, True, 4), (2, False, 100)])
def test_resumed_before_and_after_its_first_use_bit_for_bit(tiny_cfg, tmp_path, workers, grouping, period):
    opts = [*OPTS, "DATALOADER.NUM_WORKERS", workers, "DATALOADER.ASPECT_RATIO_GROUPING", grouping]
    opts += ["TEST.EVAL_PERIOD", period]
    straight = end_of(tiny_cfg(*opts, "OUTPUT_DIR", tmp_path / "straight"))
    random = torch.get_rng_state()
    for iteration, resume in ((4, False), (8, True)):
        with pytest.raises(KeyboardInterrupt):
            end_of(tiny_cfg(*opts), At(iteration, interrupt), resume=resume)
    assert_same_weights(end_of(tiny_cfg(*opts), resume=True), straight)
    assert torch.equal(torch.get_rng_state(), random)


def test_may_be_switched_on_by_a_resumed_run(tiny_cfg):
    with pytest.raises(KeyboardInterrupt):
        end_of(tiny_cfg(*OPTS, "TEST.PRECISE_BN.ENABLED", False), At(4, interrupt))
    end_of(tiny_cfg(*OPTS), resume=True)
