"""Arguments, checks, processes, and training by yaml or LazyConfig. May import every room but the studies."""

import warnings

# Detectron2 under a current torch warns of what its users cannot change.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|detectron2|fvcore)\.")
warnings.filterwarnings("ignore", message=r"(?s).*(pkg_resources|torch\.meshgrid|broadcast_buffers).*")
