"""``python -m repr_det.train``: the training command, the same as tools/train_net.py."""

from repr_det.commands.processes import run_tool
from repr_det.commands.train import start

if __name__ == "__main__":
    run_tool(start)
