"""Networks as programs of torch.export and in ONNX: ``python -m utils.export``, and such files opened."""

from utils.export.command import main

__all__ = ["main"]
