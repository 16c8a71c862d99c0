"""Export a checkpoint's network with torch.export, and to ONNX on request, checked to give the same logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from models import original
from utils.command import Parser, guarded
from utils.errors import UserError, doing
from utils.files import refuse_to_replace, replacing, write_text
from utils.training.restore import Restored, add_arguments, restore_from

TOLERANCE = 1e-4  # of the largest logit; ONNX Runtime orders its sums differently
IMAGES = 8
NORMALISED = "RGB in [0, 1], normalised by mean and std"  # in the description, which is told by it


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.export", description=__doc__)
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, e.g. dataset.root=data")
    parser.add_argument("--out", metavar="FILE.pt2", help="the program (default: <network>.pt2 beside the checkpoint)")
    parser.add_argument("--onnx", action="store_true", help="write <network>.onnx too; needs onnx and onnxscript")
    options = parser.parse_intermixed_args(arguments)
    if options.onnx:
        _require("onnx", "onnxscript")
    if options.out and not options.out.endswith(".pt2"):
        raise UserError(f"--out: {options.out}: must end in .pt2")
    restored = restore_from(options, [*options.overrides, "training.device=cpu", f"validation.batch_size={IMAGES}"])
    name = restored.config.student.title
    target = Path(options.out) if options.out else restored.path.with_name(f"{name}.pt2")
    sidecar, onnx_file = target.with_suffix(".json"), target.with_suffix(".onnx")
    refuse_to_replace([target, sidecar, *([onnx_file] if options.onnx else [])], sidecar, mark=NORMALISED)
    model = original(restored.student())  # under its own names
    images = next(iter(restored.val.epoch(0))).image[:IMAGES]
    with doing(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"{target}: {export_program(model, images, target)}")
        if options.onnx:
            print(f"{onnx_file}: {export_onnx(model, images, onnx_file)}")
        write_text(sidecar, json.dumps(description(restored, name), indent=2) + "\n")
    print(f"{sidecar}: what the input must be, and the classes")
    return 0


def export_program(model: nn.Module, images: Tensor, file: Path) -> str:
    """Save `model` as an ``ExportedProgram`` for any batch size, load it again and compare.

    Args:
        images: at least three, ``[B, 3, H, W]``.

    Returns:
        what was checked, in words.

    Raises:
        UserError: the network cannot be exported, or the loaded program gives other logits.
    """
    with doing(f"{file}: exporting the network by torch.export"):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with replacing(file) as opened:
        torch.export.save(program, opened)
    loaded = torch.export.load(file).module()
    with torch.inference_mode():
        return _compare(file, [(model(batch), loaded(batch)) for batch in _batches(images)])


def export_onnx(model: nn.Module, images: Tensor, file: Path) -> str:
    """The same as an ONNX file, run by ONNX Runtime if that is there, else by ONNX's own reference code.

    Raises:
        UserError: ONNX has no form of the network, or the file gives other logits.
    """
    shapes = ({0: torch.export.Dim("batch")},)
    file.unlink(missing_ok=True)  # which may be a link to elsewhere
    with doing(f"{file}: exporting the network to ONNX"):
        torch.onnx.export(
            model, (images,), file, dynamo=True, dynamic_shapes=shapes, input_names=["image"], output_names=["logits"],
            verbose=False, external_data=False,
        )  # fmt: skip
    run = _onnx_runner(file)
    with torch.inference_mode():
        return _compare(file, [(model(batch), torch.from_numpy(run(batch.numpy()))) for batch in _batches(images)])


def description(restored: Restored, name: str) -> dict:
    """What somebody needs to know to use the exported network."""
    height, width = restored.source.image_size
    return {
        "network": name,
        "checkpoint": str(restored.path),
        "input": f"float32 [N, 3, {height}, {width}], {NORMALISED}",
        **restored.normalisation(),
        "output": f"logits [N, {restored.source.num_classes}]",
        "classes": list(restored.source.class_names),
    }


def _batches(images: Tensor) -> list[Tensor]:
    """Two sizes, so that a batch size that was baked in shows."""
    return [images, images[:3]]


def _compare(file: Path, pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
    worst = max(float((found - expected).abs().max()) for expected, found in pairs)
    scale = max(float(expected.abs().max()) for expected, _ in pairs)
    if not worst <= TOLERANCE * max(scale, 1.0):
        raise UserError(f"{file}: gives other logits than the network, by {worst:.3g}; do not use it")
    sizes = " and ".join(str(len(expected)) for expected, _ in pairs)
    return f"same logits on batches of {sizes} validation images (largest difference {worst:.2g})"


def _onnx_runner(file: Path):
    if find_spec("onnxruntime"):
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"image": images})[0]
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(file))
    return lambda images: evaluator.run(None, {"image": images})[0]


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"--onnx: needs {' and '.join(missing)}; pip install {' '.join(missing)}")


if __name__ == "__main__":
    guarded(main)
