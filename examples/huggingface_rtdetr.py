#!/usr/bin/env python
"""RePr in the Trainer of transformers: a small random RT-DETR, on squares; resumes from checkpoints in FOLDER."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import RTDetrConfig, RTDetrForObjectDetection, Trainer, TrainerCallback, TrainingArguments

from repr_det import RePr

BODY = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "layer_type": "basic"}
BODY |= {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
SMALL = {"d_model": 32, "encoder_hidden_dim": 32, "decoder_layers": 1, "num_queries": 20, "anchor_image_size": None}
SMALL |= {"encoder_in_channels": [24, 32, 48], "decoder_in_channels": [32] * 3}


class RePrCallback(TrainerCallback):
    def __init__(self, **options: Any) -> None:
        self.options = options  # of repr_det.RePr

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **others: Any) -> None:
        batches = {"loader": others["train_dataloader"], "loss": lambda batch: model(**batch).loss}  # for frozen norms
        self.repr = RePr(model, optimizer, state.max_steps, first_step=state.global_step, **batches, **self.options)
        if (file := Path(args.output_dir, f"checkpoint-{state.global_step}", "repr.pt")).exists():
            saved = torch.load(file, weights_only=True)
            model.load_state_dict(saved["model"])  # transformers 5.24 loses those that it renames as it saves
            self.repr.load_state_dict(saved["repr"])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.repr.step()

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        saved = {"model": model.state_dict(), "repr": self.repr.state_dict()}
        torch.save(saved, Path(args.output_dir, f"checkpoint-{state.global_step}", "repr.pt"))


def batch_of(places: list[int]) -> dict[str, Any]:
    images, boxes = torch.zeros(len(places), 3, 64, 64), [torch.tensor([[x + 16, 25, 32, 32]]) / 64 for x in places]
    for image, x in zip(images, places, strict=True):
        image[:, 9:41, x : x + 32] = 1
    return {"pixel_values": images, "labels": [{"class_labels": torch.tensor([0]), "boxes": box} for box in boxes]}


def train(folder: str, callback: TrainerCallback, steps: int = 40, save_steps: int = 10) -> torch.nn.Module:
    torch.manual_seed(0)
    model = RTDetrForObjectDetection(RTDetrConfig(backbone_config=BODY, num_labels=1, **SMALL))
    options = {"max_steps": steps, "save_steps": save_steps, "report_to": "none", "remove_unused_columns": False}
    trainer = Trainer(model, TrainingArguments(folder, **options), batch_of, range(32), range(32), callbacks=[callback])
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    print(f"loss in evaluation {trainer.evaluate()['eval_loss']:.3f}")
    return model


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(sys.argv[1] if len(sys.argv) > 1 else "rtdetr", RePrCallback(layers=["model.backbone.*"], first_lr_step=20))
