"""One run: standard training, or the same with RePr, from the same weights on the same batches."""

import ctypes
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[3] / "examples"))
from saliency import SALIENCY

from cifar import network
from cifar.data import Images
from cifar.records import STANDARD, Settings
from repr_det import RePrSchedule, RePrScheme, find_filter_layers
from repr_det.method.passes import TrainingPasses

# name -> (class, its options, learning rate unless --lr says otherwise)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], float]] = {
    "sgd": (torch.optim.SGD, {}, 0.05),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 0.01),
    "adam": (torch.optim.Adam, {}, 0.001),
    "rmsprop": (torch.optim.RMSprop, {}, 0.001),
}
EVAL_BATCH = 100


def prepare_process() -> None:
    """One thread, and memory of freed tensors kept for the next ones.

    glibc gives blocks of megabytes back to the kernel, which clears the pages when the next batch takes them again:
    0.20 ms an image instead of 0.26 to 0.40, on one core of two that were both busy.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most it takes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class Feed:
    """Images normalised by the mean and standard deviation of each channel over the training images.

    Attributes:
        train, test: on ``device``.
        teacher: (N, 10) logits of the network to distil from for the N training images; None without one.
    """

    def __init__(self, training: Images, test: Images, device: str = "cpu") -> None:
        self.train, self.test = training.to(device), test.to(device)
        self.teacher: Tensor | None = None
        parts = [part.double() for part in training.pixels.split(1000)]
        count = training.pixels[..., 0].numel()
        mean = sum(part.sum((0, 1, 2)) for part in parts) / count
        variance = sum((part - mean).square().sum((0, 1, 2)) for part in parts) / (count - 1)
        self.mean, self.scale = mean.float().to(device), (1 / variance.sqrt()).float().to(device)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def batch(self, images: Images, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(N, 3, 32, 32) float32 in channels_last order, and classes (N,)."""
        pixels = images.pixels[rows].float().sub_(self.mean).mul_(self.scale)
        return pixels.permute(0, 3, 1, 2), images.classes[rows]


def schedule_of(settings: Settings) -> RePrSchedule | None:
    """RePr's schedule in iterations.

    Raises:
        UserError: a phase is shorter than an iteration, or the last restore comes at the end or after it.
    """
    if settings.row == STANDARD:
        return None
    steps = _steps(settings)
    schedule = RePrSchedule(round(steps * settings.s1 / 100), round(steps * settings.s2 / 100), settings.cycles)
    schedule.check_fits(steps)
    return schedule


def scheme_of(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, feed: Feed) -> RePrScheme | None:
    """Returns RePr over all convs, or all but the first. Raises UserError for options that are out of range."""
    if settings.row == STANDARD:
        return None
    return RePrScheme(
        find_filter_layers(model, ["*"], ["0"] if settings.skip_first else []),
        optimizer,
        criterion=SALIENCY.get(settings.row, settings.row),
        drop_ratio=settings.drop_ratio,
        max_drop_per_layer=settings.max_drop_per_layer,
        scale=settings.scale,
        criterion_batches=settings.criterion_batches,
        seed=settings.seed,
        passes=_passes(model, feed, settings.batch_size),
    )


def optimizer_of(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    kind, options, _ = OPTIMIZERS[settings.optimizer]
    return kind(model.parameters(), settings.lr, weight_decay=settings.weight_decay, **options)


def train(
    settings: Settings,
    feed: Feed,
    on_epoch: Callable[[int, float], None] = lambda epoch, accuracy: None,
    start: nn.Module | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains from new weights, or from those of ``start``.

    Args:
        on_epoch: gets the number of finished epochs and the last test accuracy in percent (NaN before the first).

    Returns:
        The model and the record of the run. Accuracies are in percent: "curve" on the test images after the epochs
        "curve_epochs", "train_curve" of every epoch's batches as they came, "train" of the finished model.
    """
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    device = feed.device
    model = network.build(settings.network, settings.dropout).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    elif settings.duplicates or settings.dead:
        network.plant(model, settings.duplicates, settings.dead)
    optimizer = optimizer_of(settings, model)
    schedule, scheme = schedule_of(settings), scheme_of(settings, model, optimizer, feed)
    transitions = () if schedule is None else (*schedule.drop_iters, *schedule.restore_iters)
    order = torch.Generator().manual_seed(settings.seed)
    half_life = settings.lr_half_life / 100 * _steps(settings)
    every = max(1, round(len(feed.test) / len(feed.train)))  # a test costs as much as a quarter of so many images
    curve, curve_epochs, train_curve, loss_curve, events = [], [], [], [], []
    diverged = None
    iteration = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        seen = torch.zeros(2, dtype=torch.float64, device=device)
        for rows in torch.randperm(len(feed.train), generator=order).to(device).split(settings.batch_size):
            images, classes = feed.batch(feed.train, rows)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                logits = model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, classes)
            if settings.distill:
                soft = distillation(logits, feed.teacher[rows], settings.temperature)
                loss = (1 - settings.distill) * loss + settings.distill * soft
            if settings.ortho_reg:
                loss = loss + settings.ortho_reg * overlap_penalty(model)
            optimizer.zero_grad()
            loss.backward()
            if half_life:
                optimizer.param_groups[0]["lr"] = settings.lr * 0.5 ** (iteration // half_life)
            optimizer.step()
            seen += torch.stack([loss.detach() * len(rows), (logits.detach().argmax(1) == classes).sum()])
            if iteration in transitions:
                if not all(parameter.isfinite().all() for parameter in model.parameters()):
                    break
                done = scheme.restore() if scheme.is_sub else scheme.drop()
                events.append({"epoch": epoch, **{k: getattr(done, k) for k in ("event", "cycle", "dropped")}})
            iteration += 1
        loss_curve.append(seen[0].item() / len(feed.train))
        train_curve.append(100 * seen[1].item() / len(feed.train))
        if not math.isfinite(loss_curve[-1]):
            diverged, loss_curve[-1] = epoch, None
        if epoch % every == 0 or epoch == settings.epochs or diverged:
            curve.append(accuracy(model, feed, feed.test))
            curve_epochs.append(epoch)
        on_epoch(epoch, curve[-1] if curve else math.nan)
        if diverged:
            break
    record = {
        "settings": dataclasses.asdict(settings),
        "final": curve[-1],
        "best": max(curve),
        "best_epoch": curve_epochs[curve.index(max(curve))],
        "train": accuracy(model, feed, feed.train),
        "curve": curve,
        "curve_epochs": curve_epochs,
        "train_curve": train_curve,
        "loss_curve": loss_curve,
        "events": events,
        "diverged": diverged,
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
    }
    return model, record


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), averaged over the N rows (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher: (N, classes).
    """
    found, wanted = (F.log_softmax(values / temperature, 1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def overlap_penalty(model: nn.Module) -> Tensor:
    """The sum over convs of |What What^T - I|_F^2, What the filters as rows of unit norm: inter-filter orthogonality as
    a regulariser. A filter that is zero adds nothing."""
    total = 0
    for conv in network.convs(model):
        unit = F.normalize(conv.weight.flatten(1))
        cosines = unit @ unit.T
        total = total + (cosines - cosines.diagonal().diag()).square().sum()
    return total


@torch.no_grad()
def logits_of(model: nn.Module, feed: Feed, images: Images) -> Tensor:
    """(N, 10), in evaluation mode."""
    was_training = model.training
    model.eval()
    starts = range(0, len(images), EVAL_BATCH)
    logits = [model(feed.batch(images, slice(first, first + EVAL_BATCH))[0]) for first in starts]
    model.train(was_training)
    return torch.cat(logits)


def accuracy(model: nn.Module, feed: Feed, images: Images) -> float:
    """Percent, in evaluation mode."""
    return 100 * int((logits_of(model, feed, images).argmax(1) == images.classes).sum()) / len(images)


def _steps(settings: Settings) -> int:
    return settings.epochs * -(-settings.train_images // settings.batch_size)


def _passes(model: nn.Module, feed: Feed, batch_size: int) -> TrainingPasses:
    """Training batches for criteria that look at data: other ones in every cycle."""

    def batches(number: int, cycle: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(feed.train), generator=torch.Generator().manual_seed(cycle))
        return [feed.batch(feed.train, rows) for rows in order.to(feed.device).split(batch_size)[:number]]

    return TrainingPasses(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
