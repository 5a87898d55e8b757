#!/usr/bin/env python
"""Measures what RePr costs and saves beside stock Detectron2; needs no data.

tools/benchmark.py [--depths 18 50 101] [--only steps transitions memory] [--device cuda] [--output FOLDER]
"""

from repr_det.commands.processes import run_tool
from repr_det.studies.benchmarking.command import main

if __name__ == "__main__":
    run_tool(main)
