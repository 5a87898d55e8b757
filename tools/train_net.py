#!/usr/bin/env python
"""Trains a detector with RePr, or its baseline, and evaluates it with COCO AP.

tools/train_net.py --config-file configs/repr_r50_fpn.yaml [--num-gpus N] [--resume] [--baseline] [KEY VALUE ...]
"""

from repr_det.commands.processes import run_tool
from repr_det.commands.train import start

if __name__ == "__main__":
    run_tool(start)
