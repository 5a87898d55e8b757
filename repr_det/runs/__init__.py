"""What keeps a run whole: its files, checkpoints, resume and stop. May import ``method`` and ``network``."""
