"""A run's settings, and finished runs as JSON lines that a killed study does not lose."""

import dataclasses
import fcntl
import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repr_det import UserError

STANDARD = "standard"  # the row that is no criterion

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on.

    A later field needs a default that means what runs did before it came, for lines that do not have it.

    Attributes:
        row: "standard", or the criterion by which RePr drops filters.
        seed: of weights, batches, dropout and RePr.
        data: digest of the images.
        network: see ``network``.
        train_images: how many of the 50,000, equally many of each class.
        epochs, batch_size: of all phases together; images.
        optimizer, lr, weight_decay: see ``training.OPTIMIZERS``.
        lr_half_life: percent of the training after which the learning rate is halved, again and again; 0: never.
        dropout: before the classifier.
        duplicates, dead: shares of the filters that begin redundant, see ``network.plant``.
        bf16: conv and linear layers in bfloat16.
        distill, temperature, teacher: weight of the teacher's term in the loss, see ``training.distillation``, and the
            key of the run that trained the teacher.
        ortho_reg: weight of ``training.overlap_penalty`` in the loss.
        warm_images, warm_epochs: of the run whose weights are the first ones, see ``warm``; 0: they are new.
        s1, s2, cycles: percent of the training with the full network and the sub-network in a cycle; how many cycles.
            These and what follows are None in "standard" runs.
        drop_ratio, max_drop_per_layer: shares.
        skip_first: the first conv keeps all its filters.
        scale: norm of a new filter, see RePrScheme.
        criterion_batches: training batches that a data-driven criterion looks at.
    """

    row: str = STANDARD
    seed: int = 0
    data: str = ""
    network: str = "3x3"
    train_images: int = 50_000
    epochs: int = 100
    batch_size: int = 64
    optimizer: str = "momentum"
    lr: float = 0.01
    weight_decay: float = 0.0
    lr_half_life: float = 0.0
    dropout: float = 0.0
    duplicates: float = 0.0
    dead: float = 0.0
    bf16: bool = False
    distill: float = 0.0
    temperature: float = 0.0
    teacher: str = ""
    ortho_reg: float = 0.0
    warm_images: int = 0
    warm_epochs: int = 0
    s1: float | None = None
    s2: float | None = None
    cycles: int | None = None
    drop_ratio: float | None = None
    max_drop_per_layer: float | None = None
    skip_first: bool | None = None
    scale: str | None = None
    criterion_batches: int | None = None

    @property
    def key(self) -> str:
        """The same for the same settings, now and after fields have been added."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = {name: value for name, value in dataclasses.asdict(self).items() if value != defaults[name]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def warm(self) -> "Settings | None":
        """The run of the standard network on fewer images whose weights this one begins with."""
        if not self.warm_images:
            return None
        return dataclasses.replace(
            self,
            row=STANDARD,
            train_images=self.warm_images,
            epochs=self.warm_epochs,
            warm_images=0,
            warm_epochs=0,
            distill=0.0,
            temperature=0.0,
            teacher="",
            **dict.fromkeys(REPR_FIELDS),
        )


REPR_FIELDS = (
    "s1", "s2", "cycles", "drop_ratio", "max_drop_per_layer", "skip_first", "scale", "criterion_batches",
)  # fmt: skip


def append(file: Path, record: Record) -> None:
    """Adds one whole line; what a kill left of a line before it is taken out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        lines.seek(0)
        whole = lines.read()
        lines.truncate(whole.rfind(b"\n") + 1)
        lines.write(json.dumps(record).encode() + b"\n")
        lines.flush()


def read(file: Path) -> list[tuple[Settings, Record]]:
    """Settings and records of the finished runs, one a key, in the order of the lines.

    Raises:
        UserError: a line is not a record.
    """
    if not file.exists():
        return []
    found = {}
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # a kill cut it short
            continue
        try:
            record = json.loads(line)
            settings = Settings(**record["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}, line {number} is no run of this program ({error}): delete the line") from None
        found.setdefault(settings.key, (settings, record))
    return list(found.values())


def group(runs: list[tuple[Settings, Record]]) -> dict[Settings, dict[Settings, dict[int, Record]]]:
    """Groups runs: settings of the standard network with seed 0 -> those of an arm (itself, RePr's) -> seed -> run."""
    groups: dict[Settings, dict[Settings, dict[int, Record]]] = {}
    for settings, record in runs:
        way = dataclasses.replace(settings, row=STANDARD, seed=0, **dict.fromkeys(REPR_FIELDS))
        arm = dataclasses.replace(settings, seed=0)
        groups.setdefault(way, {}).setdefault(arm, {})[settings.seed] = record
    return groups


def tail_epochs(record: Record) -> list[int]:
    """Returns those of the last 5 % of the epochs after which the test accuracy is known."""
    epochs = record["curve_epochs"]
    return [epoch for epoch in epochs if epoch > 0.95 * epochs[-1]]


def tail(record: Record) -> float:
    """Mean test accuracy over the last 5 % of the epochs: at a constant rate one epoch's jumps by a point or two."""
    last = tail_epochs(record)
    return statistics.mean(a for epoch, a in zip(record["curve_epochs"], record["curve"], strict=True) if epoch in last)
