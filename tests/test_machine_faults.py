"""A full disk and an image that goes bad while training: one line, nothing saved is lost, and the run goes on."""

import resource

import forked
import pytest
from conftest import At, assert_same_weights, end_of
from outcomes import train_words

from repr_det import UserError

OPTS = (
    "SOLVER.MAX_ITER 8 REPR.ENABLED True REPR.S1_ITERS 3 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 DATASETS.TEST () "
    "SOLVER.CHECKPOINT_PERIOD 2"
).split()  # iteration 5 is in the sub-network phase


def test_full_disk(tiny_cfg, tmp_path):
    """A limit on the size of files refuses writes as a full disk does, in the middle of a checkpoint."""
    straight = end_of(tiny_cfg(*OPTS, "OUTPUT_DIR", tmp_path / "straight"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = tiny_cfg(*OPTS)
    try:
        with pytest.raises(UserError) as error:
            end_of(cfg, At(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert "the checkpoint model_0000005 could not be written" in str(error.value)
    assert "File too large" in str(error.value)
    folder = tmp_path / "run"
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    assert sorted(p.name for p in folder.iterdir() if "model" in p.name or "saving" in p.name) == [
        "model_0000001.pth",
        "model_0000003.pth",
    ]
    assert_same_weights(end_of(cfg, resume=True), straight)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_goes_bad(tiny_cfg, tiny_data, tmp_path, workers):
    opts = [*OPTS, "DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", 24]
    straight = end_of(tiny_cfg(*opts, "SOLVER.CHECKPOINT_PERIOD", 100, "OUTPUT_DIR", tmp_path / "straight"))
    path = tiny_data / "images" / "4.png"
    whole = path.read_bytes()
    cfg = tiny_cfg(*opts, "SOLVER.CHECKPOINT_PERIOD", 1)
    try:
        with pytest.raises(UserError) as error:
            end_of(cfg, At(5, lambda: path.write_bytes(whole[: len(whole) // 2])))
    finally:
        path.write_bytes(whole)
    last_line = str(error.value).rstrip().rpartition("\n")[2]  # workers put a traceback before it
    assert f"{path} cannot be read and prepared for the model: " in last_line and "repair the file" in last_line
    assert_same_weights(end_of(cfg, resume=True), straight)


def test_too_many_open_files(tiny_data, tmp_path):
    words = train_words(tiny_data, tmp_path / "run", *OPTS, "DATALOADER.NUM_WORKERS", 4)
    limit = (resource.RLIMIT_NOFILE, (40, 40))
    status, text = forked.run(words, tmp_path / "log", before="resource:setrlimit", arguments=limit)
    assert status == 2, text  # workers print tracebacks of their own
    line = text.rstrip().rpartition("\n")[2]
    assert line.startswith("repr-det train: error: ") and ("Too many open files" in line or "a loader worker" in line)
    assert line.endswith("(ulimit -n) or lower DATALOADER.NUM_WORKERS; a run goes on with --resume")
