#!/usr/bin/env python
"""RePr in a Lightning Trainer: `callbacks=[RePrCallback(layers=["*.conv*"])]` is all that a run needs.

examples/lightning_callback.py [FOLDER]      # trains a small classifier of scikit-learn's digits, checkpoints to FOLDER
"""

import sys
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repr_det import RePr, UserError


class RePrCallback(lightning.Callback):
    """Options are those of ``repr_det.RePr``; the number of steps is the Trainer's."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.repr: RePr | None = None
        self.loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.repr = RePr(module, trainer.optimizers[0], int(trainer.estimated_stepping_batches), **self.options)
        if self.loaded is not None:  # Lightning has put model and optimizer back by now
            self.repr.load_state_dict(self.loaded)
        elif trainer.global_step > 0:
            raise UserError(
                "the checkpoint was trained without RePrCallback: resume without it, or begin a new training from its "
                "weights"
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step > self.repr.steps:  # not while gradients are accumulated
            self.repr.step()

    def on_train_end(self, *_: Any) -> None:
        self.repr.finish("old")  # EarlyStopping and others may end training while filters are out

    def state_dict(self) -> dict[str, Any]:
        return {} if self.repr is None else self.repr.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convs = [layer for c in (1, 16) for layer in (nn.Conv2d(c, 16, 3), nn.BatchNorm2d(16), nn.ReLU())]
        self.net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def train(folder: str, images: int = 1000, epochs: int = 4, resume: str | None = None, **options: Any) -> Digits:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels[:images], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = TensorDataset(inputs, torch.tensor(classes[:images]))
    lightning.seed_everything(0, verbose=False)
    model = Digits()
    keep_all = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [keep_all, RePrCallback(**options)]  # Lightning moves checkpoints behind all others
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet)
    trainer.fit(model, DataLoader(data, 50), ckpt_path=resume)
    return model


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "output/lightning")
