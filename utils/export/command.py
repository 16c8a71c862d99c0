"""Export a checkpoint's network with torch.export, and to ONNX on request, and measure what the files achieve."""

from __future__ import annotations

import io
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from models import original
from utils.command import Parser, whole_number
from utils.errors import UserError, doing
from utils.evaluate import Scores, latency, score_rows, scores
from utils.export.exported import DESCRIPTION, OnnxNetwork, as_texts, require
from utils.export.onnx import export_onnx, in_half_precision, quantised, quiet, save_onnx
from utils.files import refuse_to_replace, write_bytes, write_text
from utils.report.table import markdown
from utils.training.restore import Restored, add_arguments, restore_from

if TYPE_CHECKING:
    from onnx import ModelProto

TOLERANCE = 1e-4  # of the largest logit; ONNX Runtime orders its sums differently
IMAGES = 8
HALF, INT8 = ".half.onnx", ".int8.onnx"
CALIBRATION = 256  # training images by which int8 chooses its scales
SHOWN_CLASSES = 20
NORMALISED = "RGB in [0, 1], normalised by mean and std"  # in the description, which is told by it


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.export", description=__doc__)
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, e.g. dataset.root=data")
    parser.add_argument("--out", metavar="FILE.pt2", help="the program (default: <network>.pt2 beside the checkpoint)")
    parser.add_argument("--onnx", action="store_true", help="write <network>.onnx too, and evaluate it")
    parser.add_argument("--half", action="store_true", help="also with weights of 16 bits, as <network>.half.onnx")
    parser.add_argument("--int8", action="store_true", help="also quantised to 8 bits, as <network>.int8.onnx")
    parser.add_argument("--opset", type=whole_number(7), help="of the ONNX files (default: PyTorch's)")
    parser.add_argument("--batch", type=whole_number(1), help="images that the ONNX files take (default: any number)")
    options = parser.parse_intermixed_args(arguments)
    wanted = {".onnx": options.onnx or options.half or options.int8, HALF: options.half, INT8: options.int8}
    endings = [ending for ending, is_wanted in wanted.items() if is_wanted]
    if endings:
        require("onnx", "onnxscript", "onnxruntime")
    if options.out and not options.out.endswith(".pt2"):
        raise UserError(f"--out: {options.out}: must end in .pt2")
    restored = restore_from(options, [*options.overrides, "training.device=cpu"])
    name = restored.config.student.title
    target = Path(options.out) if options.out else restored.path.with_name(f"{name}.pt2")
    sidecar, files = target.with_suffix(".json"), [target.with_suffix(ending) for ending in endings]
    refuse_to_replace([target, sidecar, *files], sidecar, mark=NORMALISED)
    student, told = restored.student(), description(restored, name)
    images = next(iter(restored.val.epoch(0))).image[:IMAGES].repeat(IMAGES, 1, 1, 1)[:IMAGES]
    model = original(student)  # under its own names
    with doing(f"{target}: running the network"), torch.no_grad():
        if not isinstance(model(images.clone()), Tensor):  # some networks normalise their input in place
            model = student  # the view returns the logits alone; its names begin with "network."
    program = export_program(model, images, target)
    with doing(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(sidecar, json.dumps(told, indent=2) + "\n")  # by which the other files are known to be ours
        print(f"{target}: {save_program(program, model, images, target, told)}")
        if files:
            exported = write_onnx(model, images, files[0], told, options)
            if options.half:
                save_onnx(in_half_precision(exported), target.with_suffix(HALF), told)
            if options.int8:
                small = quantised(exported, calibration_images(restored), options.batch or 1)
                save_onnx(small, target.with_suffix(INT8), told)
            told["evaluation"] = evaluate_files(student, files, restored)
        write_text(sidecar, json.dumps(told, indent=2) + "\n")
    print(f"{sidecar}: what the input must be, the classes{', and the accuracies' if files else ''}")
    return 0


def description(restored: Restored, name: str) -> dict[str, Any]:
    """What somebody needs to know to use the exported network; every exported file says it, too."""
    height, width = restored.source.image_size
    return {
        "network": name,
        "checkpoint": str(restored.path),
        "input": f"float32 [N, 3, {height}, {width}], {NORMALISED}",
        "output": f"logits [N, {restored.source.num_classes}]",
        "preparation": "scale until resize is just covered (Pillow, bilinear), cut image_size out of the centre",
        **restored.source.describe(),
    }


def export_program(model: nn.Module, images: Tensor, file: Path) -> ExportedProgram:
    """`model` for any batch size; nothing is written.

    Args:
        images: at least four, ``[B, 3, H, W]``.
        file: what messages call it.

    Raises:
        UserError: it cannot be exported.
    """
    with doing(f"{file}: exporting the network by torch.export"), quiet():
        example = images.clone()  # it is saved, with all that it is a view of
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def save_program(program: ExportedProgram, model: nn.Module, images: Tensor, file: Path, told: dict[str, Any]) -> str:
    """Save `model` as the `program` that it was exported to, load it again and compare.

    Args:
        images: at least four, ``[B, 3, H, W]``.
        told: the `description`, which is stored within.

    Returns:
        what was checked, in words.

    Raises:
        UserError: the loaded program gives other logits.
    """
    buffer = io.BytesIO()  # PyTorch's own writer aborts the process if a disk is full
    torch.export.save(program, buffer, extra_files={DESCRIPTION: json.dumps(as_texts(told))})
    write_bytes(file, buffer.getvalue())
    return compare(file, model, torch.export.load(file).module(), images)


def write_onnx(model: nn.Module, images: Tensor, file: Path, told: dict[str, Any], options: Namespace) -> ModelProto:
    """Write the ONNX file in full precision, and compare.

    Raises:
        UserError: ONNX has no form of the network, or the file gives other logits.
    """
    exported = export_onnx(model, images, file, options.opset, options.batch)
    save_onnx(exported, file, told)
    print(f"{file}: {compare(file, model, OnnxNetwork(file), images)}")
    return exported


def calibration_images(restored: Restored) -> list[Tensor]:
    """Training images of all classes, as the network sees them in validation, each ``[3, H, W]``."""
    split = restored.source.train
    step = math.ceil(len(split) / CALIBRATION)  # a split is often sorted by class
    return [restored.source.prepare(split.picture(index)) for index in range(0, len(split), step)]


def evaluate_files(student: nn.Module, files: Sequence[Path], restored: Restored) -> dict[str, dict[str, Any]]:
    """Run the files over the validation images, print what they achieve beside the network itself, and return it."""
    found, costs = [scores(student, restored)], [latency(student, 1, restored, threads=1)]
    for file in files:
        network = OnnxNetwork(file, threads=1)
        size = network.batch or 1
        costs.append(latency(network, size, restored, threads=1) / size)
        found.append(scores(OnnxNetwork(file), restored))
    names = [f"{restored.config.student.title} (PyTorch)", *(file.name for file in files)]
    agreement = [100 * (item.predicted == found[0].predicted).double().mean().item() for item in found]
    sizes = [f"{file.stat().st_size / 1e6:.2f}" for file in files]
    rows = [
        *score_rows(found),
        ["same class as by PyTorch (%)", *(f"{share:.2f}" for share in agreement)],
        ["one image on one thread (ms, median)", *(f"{cost:.2f}" for cost in costs)],
        ["size of the file (MB)", "", *sizes],
        *_class_rows(found, restored.source.class_names),
    ]
    print(f"\n{markdown(pd.DataFrame(rows, columns=['', *names]))}\n")
    return {
        name: {**item.values(), "agreement": share, "milliseconds": cost, "per_class": item.per_class()}
        for name, item, share, cost in zip(names, found, agreement, costs)
    }


def _class_rows(found: Sequence[Scores], names: Sequence[str]) -> list[list[str]]:
    """The accuracies of the classes; of many, those which lose most."""
    rows = [(name, values) for name, *values in zip(names, *(item.per_class() for item in found)) if None not in values]
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: min(row[1]) - row[1][0])[:SHOWN_CLASSES]
    return [[f"top-1 of {name} (%)", *(f"{value:.2f}" for value in values)] for name, values in rows]


@torch.inference_mode()
def compare(file: Path, model: nn.Module, exported: nn.Module, images: Tensor) -> str:
    """Say that both give the same logits on batches of three sizes, so that a size that was baked in shows."""
    batches = (images, images[:3], images[:1])
    pairs = [(model(batch.clone()), exported(batch.clone())) for batch in batches]  # see `main`
    worst = max(float((found - expected).abs().max()) for expected, found in pairs)
    scale = max(float(expected.abs().max()) for expected, _ in pairs)
    if not worst <= TOLERANCE * max(scale, 1.0):
        raise UserError(f"{file}: gives other logits than the network, by {worst:.3g}; do not use it")
    return f"same logits on batches of {len(images)}, 3 and 1 validation images (largest difference {worst:.2g})"
