"""Networks to ONNX, in 32, 16 and 8 bits."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils.errors import UserError, doing, reason
from utils.export.exported import as_texts
from utils.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto


def export_onnx(model: nn.Module, images: Tensor, file: Path, opset: int | None, batch: int | None) -> ModelProto:
    """`model` in ONNX, which takes `batch` images, or any number.

    Args:
        images: some that the network can be run on, ``[B, 3, H, W]``.
        file: what messages call it.
        opset: version of the operators; None: PyTorch's usual one.

    Raises:
        UserError: ONNX has no form of the network, or not in that version.
    """
    example = images if batch is None else images.repeat(batch, 1, 1, 1)[:batch]
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    with doing(f"{file}: exporting the network to ONNX"), quiet():
        try:
            program = torch.onnx.export(
                model, (example,), dynamo=True, dynamic_shapes=shapes, input_names=["image"], output_names=["logits"],
                opset_version=opset, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:  # about the steps of the exporter; the cause says which operator
            while error.__cause__ is not None:
                error = error.__cause__
            raise UserError(f"{file}: ONNX has no form of the network: {reason(error)}") from error
    (found,) = (entry.version for entry in program.model_proto.opset_import if entry.domain == "")
    if opset not in (None, found):
        raise UserError(f"--opset: the network cannot be written in version {opset}; {found} can be")
    return program.model_proto


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantiser log what they try in vain, some with tracebacks, or print pages about a network."""
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def save_onnx(model: ModelProto, file: Path, told: dict[str, Any]) -> None:
    """Write `model` with the description among its metadata."""
    from onnx.helper import set_model_props

    set_model_props(model, as_texts(told))
    with replacing(file) as opened:
        opened.write(model.SerializeToString())


def in_half_precision(model: ModelProto) -> ModelProto:
    """`model` with weights and activations of 16 bits; its input and its logits keep 32."""
    with doing("converting the network to 16 bits"):
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def quantised(model: ModelProto, images: Sequence[Tensor], batch: int) -> ModelProto:
    """`model` with weights and activations of 8 bits, by ONNX Runtime's static quantisation.

    Args:
        images: normalised, each ``[3, H, W]``; the scales of the activations are chosen by them.
        batch: how many `model` takes at a time.
    """
    with doing("quantising the network to 8 bits"), quiet(), tempfile.TemporaryDirectory() as folder:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self):
                self._images = iter(images)

            def get_next(self) -> dict[str, np.ndarray] | None:
                part = list(islice(self._images, batch))
                return {"image": torch.stack((part * batch)[:batch]).numpy()} if part else None

        plain, prepared, out = (Path(folder, f"{name}.onnx") for name in ("plain", "prepared", "out"))
        onnx.save(model, plain)
        quant_pre_process(plain, prepared, skip_optimization=True, skip_symbolic_shape=True)
        # Activations without a sign: half the time of those with one on a CPU with VNNI, equally exact (measured).
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        return onnx.load(out)
