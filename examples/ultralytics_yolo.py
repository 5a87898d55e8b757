#!/usr/bin/env python
"""RePr in Ultralytics YOLO (AGPL-3.0), by callbacks: YOLO11n, random, on bright squares; resumes FOLDER/run."""

import logging
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics import YOLO

from repr_det import RePr, apply_repr


class RePrCallbacks:
    """last.pt has the average alone, in half precision: repr.pt beside it has what training resumes from."""

    def __init__(self, yolo: YOLO, **options: Any) -> None:
        self.options = options  # of repr_det.RePr
        yolo.add_callback("on_train_start", self.start)
        yolo.add_callback("on_model_save", self.save)

    def start(self, trainer: Any) -> None:
        an_epoch = -(-len(trainer.train_loader) // trainer.accumulate)
        steps = {"total_steps": trainer.epochs * an_epoch, "first_step": trainer.start_epoch * an_epoch}
        steps["first_lr_step"] = steps["total_steps"] // 2  # the rate is half of its peak
        self.repr = apply_repr(trainer.model, trainer.optimizer, averages=[trainer.ema], **steps, **self.options)
        self.parts = {"model": trainer.model, "ema": trainer.ema.ema, "optimizer": trainer.optimizer, "repr": self.repr}
        if trainer.start_epoch and (trainer.wdir / "repr.pt").exists():
            saved = torch.load(trainer.wdir / "repr.pt", weights_only=True)
            for name, part in self.parts.items():  # RePr comes last
                part.load_state_dict(saved[name])

    def save(self, trainer: Any) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, trainer.wdir / "repr.pt")


def train(folder: Path, epochs: int = 12, **options: Any) -> RePr:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(16):
        image = np.random.default_rng(index).integers(0, 128, (64, 64, 3), dtype=np.uint8)
        image[index : index + 32, 9:41] += 127
        cv2.imwrite(str(folder / f"{index}.png"), image)
        (folder / f"{index}.txt").write_text(f"0 {25 / 64} {(index + 16) / 64} 0.5 0.5")
    (folder / "data.yaml").write_text(f"{{path: '{folder.resolve()}', train: ., val: ., names: [square]}}")
    last = folder / "run" / "weights" / "last.pt"
    yolo = YOLO(last if last.exists() else "yolo11n.yaml")
    callbacks = RePrCallbacks(yolo, **options)
    where = {"data": folder / "data.yaml", "project": str(folder.resolve()), "name": "run", "exist_ok": True}
    yolo.train(epochs=epochs, imgsz=64, batch=4, nbs=4, workers=0, plots=False, resume=last.exists(), **where)
    print(f"mAP50 {yolo.metrics.box.map50:.3f}")
    return callbacks.repr


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(Path(sys.argv[1] if len(sys.argv) > 1 else "yolo"))
