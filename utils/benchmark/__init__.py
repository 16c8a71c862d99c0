"""What distillation costs on this machine: ``python -m utils.benchmark``."""

import os

# Kineto, which counts the bytes of tensors on a CPU, reports its own starts and stops; to be said before it is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
