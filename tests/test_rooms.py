"""The rooms of the package: what works without Detectron2, what users import, and a run from before the rooms."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, end_of

import repr_det

HERE = Path(__file__).parent

WITHOUT_DETECTRON2 = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detectron2", "fvcore", "pycocotools", "cv2", "yaml", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from torch import nn
import repr_det.method
from repr_det import RePrScheme, find_filter_layers
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
scheme = RePrScheme(find_filter_layers(model, ["*"]), optimizer, slim_model=model)
dropped = scheme.drop().dropped
model(torch.randn(2, 3, 9, 9)).square().mean().backward()
optimizer.step()
assert all(model.get_submodule(n).weight[i].count_nonzero() == 0 for n, rows in dropped.items() for i in rows)
restored = scheme.restore()
assert restored.dropped == dropped and restored.overlap_after < restored.overlap_before + 1
assert max(restored.max_cosine.values()) < 1e-5
try:
    repr_det.RePrHook
except ImportError as error:
    print(sum(map(len, dropped.values())), error)
"""


def test_the_method_runs_one_cycle_without_detectron2():
    done = subprocess.run([sys.executable, "-c", WITHOUT_DETECTRON2], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 repr_det.RePrHook needs Detectron2, which is not installed")  # floor(0.3 * 16)


@pytest.mark.parametrize(
    "name",
    ["RePrHook", "RePrScheme", "RePrSchedule", "Trainer", "UserError", "add_repr_config", "find_filter_layers"],
)
def test_what_users_import(name):
    assert getattr(repr_det, name).__name__ == name


def test_a_run_of_version_0_1_0_is_resumed(tiny_cfg, tmp_path):
    """The checkpoint lies in the sub-network phase; the commit before the rooms finished the run from it."""
    folder = tmp_path / "run"
    with tarfile.open(HERE / "data" / "run_of_version_0_1_0.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.11.2
    tiny = (
        "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.RES2_OUT_CHANNELS 4 MODEL.RESNETS.WIDTH_PER_GROUP 2 "
        "MODEL.RESNETS.STEM_OUT_CHANNELS 4 MODEL.FPN.OUT_CHANNELS 8 MODEL.ROI_BOX_HEAD.FC_DIM 8 SOLVER.MAX_ITER 8 "
        "REPR.ENABLED True REPR.S1_ITERS 2 REPR.S2_ITERS 3 REPR.NUM_CYCLES 1 SOLVER.CHECKPOINT_PERIOD 4"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the run that was not stopped: sums in another order choose other proposals
    try:
        found = end_of(tiny_cfg(*SMALL, *tiny.split(), "OUTPUT_DIR", str(folder)), resume=True)
    finally:
        torch.set_num_threads(threads)
    wanted = torch.load(folder / "final_weights.pth", weights_only=True)
    assert found.keys() == wanted.keys()
    start = torch.load(folder / "model_0000003.pth", weights_only=True)["model"]
    for name, value in wanted.items():
        # Of another machine, so not bit for bit: up to 8 % of a tensor's way in these four steps were seen between two.
        away, way = ((value - other[name]).double().norm() for other in (found, start))
        assert away <= 0.25 * way + 1e-6, name
    names = [name for name, value in wanted.items() if value.is_floating_point()]
    end, other, begin = (torch.cat([state[n].double().flatten() for n in names]) for state in (wanted, found, start))
    assert (end - other).norm() <= 0.005 * (end - begin).norm()  # most of it is what the restored filters went
    moved = [n for n in wanted if not torch.allclose(wanted[n].float(), start[n].float(), rtol=1e-3, atol=2e-4)]
    assert any("res5" in name for name in moved)
