#!/usr/bin/env python
"""RePr with torchvision's own detection models in a loop of one's own, on the embedded shapes.

examples/torchvision_detection.py [--model fasterrcnn_resnet50_fpn] [--steps 40] [--checkpoint FILE] [--resume]

What takes part: in Faster R-CNN and RetinaNet the convs of the ResNet's blocks (layer1 to layer4; with weights of
ImageNet those that are not frozen), in SSDlite all convs of the MobileNet but those that put out the factors of
squeeze-and-excitation, which are not 0 where the conv puts out 0. FPN, the heads and the shortcuts' convs train on.
Random weights here, and so BN; with weights of ImageNet torchvision takes its FrozenBatchNorm2d, for which RePr needs
`loader` and `loss` as they are given below.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from repr_det import RePr, UserError
from repr_det.datasets import CLASS_NAMES, generate_shapes

# Model -> patterns of the convs that take part, and of those among them that do not.
MODELS = {
    "fasterrcnn_resnet50_fpn": (["backbone.body.layer*.conv*"], []),
    "retinanet_resnet50_fpn": (["backbone.body.layer*.conv*"], []),
    "ssdlite320_mobilenet_v3_large": (["backbone.features.*"], []),
}
BATCH_SIZE = 2
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def build_model(name: str, size: int, **options: Any) -> nn.Module:
    """With random weights; images of ``size`` px (SSDlite: 320); options of torchvision's builder."""
    sizes = {} if name.startswith("ssd") else {"min_size": size, "max_size": 2 * size}
    build = getattr(torchvision.models.detection, name)
    return build(weights=None, weights_backbone=None, num_classes=len(CLASS_NAMES) + 1, **sizes, **options)


def shapes(number: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (3, H, W), RGB in [0, 1] with boxes (N, 4) in px and labels (N,) from 1."""
    examples = []
    for image, annotations in generate_shapes(1, number):
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in annotations])
        pixels = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) / 255
        examples.append((pixels, {"boxes": boxes, "labels": labels}))
    return examples


def batches_of(examples: list, epoch: int) -> list[Batch]:
    """All batches of an epoch, in an order that depends on ``epoch`` only, so that a resumed run sees the same."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(epoch)).tolist()
    chosen = [[examples[i] for i in order[at : at + BATCH_SIZE]] for at in range(0, len(order), BATCH_SIZE)]
    return [([image for image, _ in batch], [target for _, target in batch]) for batch in chosen]


def train(args: argparse.Namespace) -> nn.Module:
    """Trains, and writes ``args.checkpoint`` every ``args.save_every`` steps."""
    torch.manual_seed(0)
    model = build_model(args.model, args.size).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=1e-4)
    examples = shapes(args.images)

    def loss_of(batch: Batch) -> Tensor:
        return sum(model(*batch).values())

    include, exclude = MODELS[args.model]
    repr_training = RePr(
        model,
        optimizer,
        args.steps,
        layers=include,
        exclude=exclude,
        num_cycles=args.cycles,
        loader=batches_of(examples, epoch=0),
        loss=loss_of,
    )
    layers = repr_training.scheme.layers
    print(f"{len(layers)} convs with {sum(x.num_filters for x in layers)} filters take part; {repr_training.schedule}")
    start = load(args.checkpoint, model, optimizer, repr_training) if args.resume else 0

    an_epoch = len(batches_of(examples, 0))
    for step in range(start, args.steps):
        loss = loss_of(batches_of(examples, step // an_epoch)[step % an_epoch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        transition = repr_training.step()
        print(f"step {step}: loss {loss.item():.3f}")
        if transition is not None:
            dropped = sum(map(len, transition.dropped.values()))
            print(f"{transition.event} of {dropped} filters; the {repr_training.phase} network trains on")
        if args.checkpoint and (step + 1) % args.save_every == 0:
            save(args.checkpoint, model, optimizer, repr_training)
    return model


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, repr_training: RePr) -> None:
    state = {"model": model, "optimizer": optimizer, "repr": repr_training}
    # Proposals are sampled at random, so the random state belongs to the run as well.
    torch.save({key: x.state_dict() for key, x in state.items()} | {"random": torch.get_rng_state()}, path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, repr_training: RePr) -> int:
    """Puts everything back, RePr last; the step to go on with."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    repr_training.load_state_dict(state["repr"])
    torch.set_rng_state(state["random"])
    return repr_training.steps


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fasterrcnn_resnet50_fpn", choices=MODELS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="of the shorter side in px")
    parser.add_argument("--checkpoint", type=Path, help="file to write and to resume from")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    if args.resume and (args.checkpoint is None or not args.checkpoint.is_file()):
        raise UserError(f"--resume needs --checkpoint FILE of an earlier run, got {args.checkpoint}")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.")
    return train(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"torchvision_detection.py: error: {error}\n")
        sys.exit(2)
