"""Look into checkpoints, take students out of them, and bring in other people's teachers.

python -m utils.convert show run/cifar-100/1029/vgg13/ckpt/best.pth
python -m utils.convert export run/cifar-100/1029/adaptive-at/vgg13-vgg8/ckpt/best.pth vgg8.safetensors
python -m utils.convert import ckpt_epoch_240.pth --model vgg13 teacher.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from models import MODELS, StagedModel, get_model
from utils.command import Parser, guarded, whole_number
from utils.config import Config
from utils.errors import UserError, printable
from utils.files import replacing
from utils.run_folder.checkpoint import assign_weights, read_checkpoint, read_weights, save_atomically

COUNTERS = "num_batches_tracked"  # of BatchNorm; files from before PyTorch 0.4.1 lack them
Shapes = dict[str, tuple[int, ...]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m utils.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="say what is in a checkpoint")
    show.set_defaults(run=lambda options: print(describe(options.file)))

    export = commands.add_parser("export", help="write the network alone: the student, or a model trained alone")
    export.set_defaults(run=lambda options: print(export_network(options.file, options.out, options.format)))
    export.add_argument("--format", choices=["pth", "safetensors"], help="default: by the ending of OUT, else pth")

    imported = commands.add_parser(
        "import", help="check somebody's weights against a model and write them as a checkpoint of ours"
    )
    imported.set_defaults(
        run=lambda options: print(
            import_network(options.file, options.out, options.model, options.num_classes, options.image_size)
        )
    )
    imported.add_argument(
        "--model", required=True, help="a model of models/, or an import path such as torchvision.models.resnet34"
    )
    imported.add_argument("--num-classes", type=whole_number(2), help="default: as many as the file has")
    imported.add_argument(
        "--image-size", type=whole_number(1), default=32, help="on which to check a model given by import path"
    )

    for command in (show, export, imported):
        command.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, state_dict or .safetensors")
    for command in (export, imported):
        command.add_argument("out", type=Path, metavar="OUT", help="the file to write; must not exist")
    return parser


def describe(path: Path) -> str:
    """What is in a checkpoint, one thing a line."""
    content = read_checkpoint(path)
    weights = _tensors(read_weights(path), path)
    parameters = sum(value.numel() for value in weights.values())
    rows = {
        "file": f"{path}, {path.stat().st_size / 1e6:.1f} MB",
        "kind": _kind(content),
        "network": ", ".join(matching_models(weights)) or "none of the registered models",
        "classes": str(count_classes(weights)),
        "weights": f"{len(weights)} entries, {parameters:,} numbers",
    }
    if "format" in content and "config" in content:
        rows |= _rows_of_ours(content)
    elif len(weights) != len(content):
        rows |= {str(key): _short(value) for key, value in content.items()}
    width = max(map(len, rows))
    return "\n".join(printable(f"{key:<{width}}  {value}") for key, value in rows.items())


def export_network(path: Path, out: Path, form: str | None = None) -> str:
    """Write a checkpoint's network as a bare state_dict, in PyTorch's format or as safetensors.

    Returns:
        a line that says what was done.
    """
    _refuse_existing(out)
    weights = {key: value.contiguous() for key, value in _tensors(read_weights(path), path).items()}
    if (form or out.suffix.removeprefix(".")) != "safetensors":
        save_atomically(weights, out)
    else:
        with replacing(out) as file:
            file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    return f"{out}: {len(weights)} entries of {' or '.join(matching_models(weights)) or 'a network'}"


def import_network(path: Path, out: Path, name: str, num_classes: int | None = None, image_size: int = 32) -> str:
    """Write somebody's weights as a checkpoint that ``kd.teacher.checkpoint`` and ``model.checkpoint`` take anywhere.

    Entries of other names, e.g. torchvision's of a VGG, are taken in their order if every shape agrees.

    Returns:
        a line that says what was done.

    Raises:
        UserError: they are not the weights of the model called `name`; nothing is written.
    """
    _refuse_existing(out)
    weights = _tensors(read_weights(path), path)
    classes = num_classes or count_classes(weights)
    model = get_model(name, classes, image_size=(image_size, image_size))
    renamed = in_order(weights, model)
    assign_weights(model, renamed or weights, f"{path}: not the weights of {name} with {classes} classes")
    save_atomically({"model": model.state_dict(), "name": name, "num_classes": classes, "source": str(path)}, out)
    how = "entry by entry in their order, for the names differ" if renamed else "every name and shape agrees"
    return f"{out}: {name} with {classes} classes ({how})"


def count_classes(weights: dict[str, Tensor]) -> int:
    """Rows of the last matrix, which in a network that classifies is the classifier's."""
    matrices = [value for value in weights.values() if value.ndim == 2]
    if not matrices:
        raise UserError("the file holds no matrix that could be a classifier; --num-classes says how many there are")
    return len(matrices[-1])


def matching_models(weights: dict[str, Tensor]) -> list[str]:
    """Registered models with the very names and shapes of `weights`."""
    found, classes = _shapes(weights), count_classes(weights)
    return [name for name in MODELS if _shapes_of_model(name, classes) == found]


def in_order(weights: dict[str, Tensor], model: StagedModel) -> dict[str, Tensor] | None:
    """`weights` under the names of `model`, if the names differ but the shapes, one after another, do not."""
    found, expected = _shapes(weights), _shapes(model.state_dict())
    if found.keys() == expected.keys() or list(found.values()) != list(expected.values()):
        return None
    return {ours: weights[theirs] for ours, theirs in zip(expected, found)}


def _shapes(weights: dict[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in weights.items() if not key.endswith(COUNTERS)}


@cache
def _shapes_of_model(name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        return _shapes(get_model(name, num_classes).state_dict())


def _tensors(weights: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: holds no network; {key} is a {type(value).__name__}, expected a tensor")
    if not weights:
        raise UserError(f"{path}: holds no network, it is empty")
    return weights


def _kind(content: dict[str, Any]) -> str:
    if "format" in content and "config" in content:
        return "checkpoint of a run"
    return "weights among other things" if any(isinstance(value, dict) for value in content.values()) else "state_dict"


def _rows_of_ours(content: dict[str, Any]) -> dict[str, str]:
    config = Config.from_dict(content["config"])
    best, progress = content["best"], content["progress"]
    extra = content["extra"]
    return {
        "run": f"{config.title} | {config.dataset.label} | seed {config.training.seed}",
        "progress": f"{progress['epoch']} of {config.training.epochs} epochs, {progress['step']} steps",
        "accuracy": f"best {best['top1']:.2f}% (epoch {best['epoch']}), last {content['val'].get('top1', -1):.2f}%",
        "extra": f"{len(extra)} entries: {', '.join(dict.fromkeys(key.split('.')[0] for key in extra)) or 'none'}",
    }


def _short(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return str(tuple(value.shape)) if isinstance(value, Tensor) else str(value)[:80]


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already; name another file or remove it first")


if __name__ == "__main__":
    guarded(main)
