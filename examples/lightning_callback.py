#!/usr/bin/env python
"""RePr in a Lightning Trainer, by a callback: a small classifier of scikit-learn's digits."""

import logging
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from repr_det import RePr


class RePrCallback(lightning.Callback):
    def __init__(self, **options: Any) -> None:
        self.options, self.repr, self.loaded = options, None, None

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        total, done = int(trainer.estimated_stepping_batches), trainer.global_step
        self.repr = RePr(module, trainer.optimizers, total, first_step=done, **self.options)
        if self.loaded:  # model and optimizer are those of the checkpoint by now
            self.repr.load_state_dict(self.loaded)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step > self.repr.steps:  # not while gradients are accumulated
            self.repr.step()

    def on_train_end(self, *_: Any) -> None:  # by EarlyStopping perhaps, while filters are dropped
        if self.repr is not None:
            self.repr.finish()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.repr is None else self.repr.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        scores = self.net(batch[0])
        self.log("accuracy", (scores.argmax(1) == batch[1]).float().mean(), prog_bar=True, on_epoch=True)
        return nn.functional.cross_entropy(scores, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(classes))
    lightning.Trainer(max_epochs=4, callbacks=[RePrCallback()]).fit(Digits(), DataLoader(data, 50))
