"""The files of a run, its checkpoints, resume and stop, which keep it whole. May import ``method`` and ``network``."""
