#!/usr/bin/env python
"""Shows how much the filters of a checkpoint overlap, and which ones RePr would drop; trains nothing, needs no GPU.

tools/analyze_filters.py CHECKPOINT [--config-file FILE [--batches 2]] [--criterion ortho] [--json FILE] [--plot FILE]
"""

from repr_det.commands.processes import run_tool
from repr_det.studies.analysis import main

if __name__ == "__main__":
    run_tool(main)
