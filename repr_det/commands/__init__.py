"""The commands: arguments, the checks before the first step, the processes, and the two training commands.

May import every room but the studies.
"""

import warnings

# Detectron2 of 2024 under a current torch warns at every start about what its users cannot change.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|detectron2|fvcore)\.")
warnings.filterwarnings("ignore", message=r"(?s).*(pkg_resources|torch\.meshgrid|broadcast_buffers).*")
