#!/usr/bin/env python
"""Trains a detector that a LazyConfig describes, with RePr where its node `repr` says so.

tools/lazyconfig_train_net.py --config-file configs/lazy/repr_faster_rcnn_r50_fpn.py [--num-gpus N] [path.key=value ...]
"""

from repr_det.commands.processes import run_tool
from repr_det.commands.train import start

if __name__ == "__main__":
    run_tool(start)
