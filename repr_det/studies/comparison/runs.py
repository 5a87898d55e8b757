"""A run of one arm: its seed, folder and command, and whether that folder is empty, unfinished or finished."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repr_det.studies.comparison.records import read_metrics

BASELINE, REPR = "baseline", "repr"
ARM_NAMES = {BASELINE: "baseline", REPR: "RePr"}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: "baseline" or "repr".
        seed: SEED of the run; baseline and RePr runs are paired by it.
        folder: its OUTPUT_DIR.
        max_iter: SOLVER.MAX_ITER, scaled to the number of processes.
        flags: the command up to the place where --resume belongs; empty for a run that was trained elsewhere.
        opts: the KEY VALUE pairs after it.
    """

    arm: str
    seed: int
    folder: Path
    max_iter: int
    flags: tuple[str, ...] = ()
    opts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{ARM_NAMES[self.arm]} seed {self.seed}"

    def command(self, resume: bool = False) -> list[str]:
        return [*self.flags, *(["--resume"] if resume else []), *self.opts]


def planned_run(
    arm: str,
    seed: int,
    folder: Path,
    max_iter: int,
    config_file: str,
    register: Sequence[Sequence[str]] = (),
    opts: Sequence[str] = (),
    num_gpus: int = 1,
) -> Run:
    """The run that ``python -m repr_det.train`` makes of these arguments."""
    flags = [sys.executable, "-m", "repr_det.train", "--config-file", config_file]
    if arm == BASELINE:
        flags.append("--baseline")
    if num_gpus > 1:
        # Detectron2 derives the default port from the user id, which two runs at once would share.
        flags += ["--num-gpus", str(num_gpus), "--dist-url", "auto"]
    for words in register:
        flags += ["--register", *words]
    own = [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    return Run(arm, seed, folder, max_iter, tuple(flags), tuple(own))


def final_row(folder: Path, max_iter: int) -> dict[str, float] | None:
    """The evaluation after the last iteration, or None where the run is not finished. Its AP may be NaN."""
    # A run that is resumed after its last step logs its evaluation one iteration later.
    rows = [row for i, row in read_metrics(folder).items() if i >= max_iter and "bbox/AP" in row]
    return rows[-1] if rows else None


def is_finished(run: Run) -> bool:
    return final_row(run.folder, run.max_iter) is not None


def last_iteration(folder: Path) -> int:
    """Iterations that the folder's metrics.json knows of; 0 where there is none."""
    return max((i + 1 for i, row in read_metrics(folder).items() if "total_loss" in row), default=0)


def is_number(value: object) -> bool:
    """A finite number that is not COCO's -1 for "no such objects"."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
