"""Look into checkpoints, take students out of them, and bring in other people's teachers.

python -m utils.convert show run/cifar-100/1029/vgg13/ckpt/best.pth
python -m utils.convert export run/cifar-100/1029/adaptive-at/vgg13-vgg8/ckpt/best.pth vgg8.safetensors
python -m utils.convert import ckpt_epoch_240.pth --model vgg13 teacher.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from models import MODELS, get_model
from utils.command import Parser, guarded, whole_number
from utils.config import Config
from utils.config.yaml_text import parse_yaml
from utils.errors import UserError, printable
from utils.files import replacing
from utils.run_folder.checkpoint import LeftOut, read_checkpoint, save_atomically
from utils.run_folder.weights import (
    EMA_HELP,
    Shapes,
    assign_weights,
    average_instead,
    in_order,
    not_plain,
    select_weights,
    shapes,
)

_FORMATS = {".pth": "pth", ".pt": "pth", ".safetensors": "safetensors"}


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
    export.set_defaults(
        run=lambda options: print(export_network(options.file, options.out, options.format, options.ema))
    )
    export.add_argument("--ema", action="store_true", help=EMA_HELP)
    export.add_argument("--format", choices=["pth", "safetensors"], help="default: by the ending of OUT")

    imported = commands.add_parser(
        "import", help="check somebody's weights against a model and write them as a checkpoint of ours"
    )
    imported.set_defaults(run=_import)
    imported.add_argument(
        "--model", required=True, help="a model of models/, or an import path such as torchvision.models.resnet34"
    )
    imported.add_argument("--num-classes", type=whole_number(2), help="default: as many as the file has")
    imported.add_argument(
        "--prefix", default="", help="take only the entries whose names begin so, without it, e.g. model. or student."
    )
    imported.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave this entry out, and all below it; repeatable"
    )
    imported.add_argument("--kwargs", type=_yaml(dict), default={}, help="arguments of the model, e.g. '{depth: 3}'")
    imported.add_argument("--stages", type=_stages, help="how to cut a model given by import path")
    imported.add_argument(
        "--image-size",
        type=_size,
        default=(32, 32),
        metavar="N[xN]",
        help="on which to check such a model (default: 32)",
    )

    for command in (show, export, imported):
        command.add_argument("file", type=Path, metavar="FILE", help="a checkpoint, state_dict or .safetensors")
    for command in (export, imported):
        command.add_argument("out", type=Path, metavar="OUT", help="the file to write; must not exist")
    return parser


def _yaml(kind: type) -> Callable[[str], Any]:
    """The ``type=`` of an argument that is a mapping or a list."""

    def parse(text: str) -> Any:
        try:
            value = parse_yaml(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"found {text!r}, must be a {'mapping' if kind is dict else 'list'}")
        return value

    return parse


def _stages(text: str) -> list[list[str]]:
    value = _yaml(list)(text)
    if not all(isinstance(stage, list) and all(isinstance(name, str) for name in stage) for stage in value):
        raise argparse.ArgumentTypeError(f"found {text!r}, must be a list of lists of names, e.g. [[conv1], [layer1]]")
    return value


def _size(text: str) -> tuple[int, int]:
    """``"32"`` or ``"32x48"``: height and width."""
    height, _, width = text.partition("x")
    if not height:
        raise argparse.ArgumentTypeError(f"found {text!r}, must be a number of pixels, or two such as 32x48")
    side = whole_number(1)
    return side(height), side(width or height)


def _import(options: argparse.Namespace) -> None:
    keys = ("num_classes", "image_size", "prefix", "drop", "kwargs", "stages")
    print(import_network(options.file, options.out, options.model, **{key: getattr(options, key) for key in keys}))


def describe(path: Path) -> str:
    """What is in a checkpoint, one thing a line."""
    content = _read(path)
    weights = _tensors(content, path)
    parameters = sum(value.numel() for value in weights.values())
    rows = {
        "file": f"{path}, {path.stat().st_size / 1e6:.1f} MB",
        "kind": _kind(content),
        "network": ", ".join(matching_models(weights)) or "none of the registered models",
        "classes": str(count_classes(weights) or "unknown, there is no matrix that could be a classifier"),
        "weights": f"{len(weights)} entries, {parameters:,} numbers",
    }
    if "format" in content and "config" in content:
        rows |= _rows_of_ours(content, path)
    elif len(weights) != len(content):
        rows |= {str(key): _short(value) for key, value in content.items()}
    width = max(map(len, rows))
    return "\n".join(printable(f"{key:<{width}}  {value}") for key, value in rows.items())


def export_network(path: Path, out: Path, form: str | None = None, average: bool = False) -> str:
    """Write a checkpoint's network, or the moving average of it, as a bare state_dict: PyTorch's format or safetensors.

    Args:
        form: ``pth`` or ``safetensors``; None: by the ending of `out`.

    Returns:
        a line that says what was done.

    Raises:
        UserError: `out` is there, or the ending is of neither; or `path` holds no network.
    """
    _refuse_existing(out)
    form = form or _FORMATS.get(out.suffix.lower())
    if form is None:
        raise UserError(f"{out}: must end in {', '.join(_FORMATS)}, or --format says how it is written")
    content = _read(path)
    if average:
        content = average_instead(content, path)
    # Copies: safetensors takes no tensors that share their memory, and a view would be saved with all it is a view of.
    weights = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in _tensors(content, path).items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if form != "safetensors":
        save_atomically(weights, out)
    else:
        with replacing(out) as file:
            file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    return f"{out}: {len(weights)} entries of {' or '.join(matching_models(weights)) or 'a network'}"


def import_network(
    path: Path,
    out: Path,
    name: str,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] = (32, 32),
    prefix: str = "",
    drop: Sequence[str] = (),
    kwargs: dict[str, Any] | None = None,
    stages: list[list[str]] | None = None,
) -> str:
    """Write somebody's weights as a checkpoint that ``kd.teacher.checkpoint`` and ``model.checkpoint`` take anywhere.

    Entries of other names, e.g. torchvision's of a VGG, are taken in their order if every shape agrees. Objects in the
    file that are neither tensors nor plain values are left out; none of their code runs.

    Args:
        path: the file.
        out: the file to write.
        name, num_classes, image_size, kwargs, stages: of the model, see `models.get_model`; `num_classes` is by default
            what the file has.
        prefix, drop: which entries of the file are the model's, see `select_weights`.

    Returns:
        a line that says what was done.

    Raises:
        UserError: they are not the weights of the model called `name`; nothing is written.
    """
    _refuse_existing(out)
    weights = _tensors(_read(path), path, prefix, drop)
    classes = num_classes or count_classes(weights)
    if classes is None:
        raise UserError(f"{path}: no matrix in it could be a classifier; --num-classes says how many classes there are")
    model = get_model(name, classes, stages=stages, kwargs=kwargs, image_size=image_size)
    renamed = in_order(weights, model)
    assign_weights(model, renamed or weights, f"{path}: not the weights of {name} with {classes} classes")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({"model": model.state_dict(), "name": name, "num_classes": classes, "source": str(path)}, out)
    how = "entry by entry in their order, for the names differ" if renamed else "every name and shape agrees"
    return f"{out}: {name} with {classes} classes ({how})"


def count_classes(weights: dict[str, Tensor]) -> int | None:
    """Rows of the last matrix, which in a network that classifies is the classifier's; None if there is no matrix."""
    return next((len(value) for value in reversed(weights.values()) if value.ndim == 2), None)


def matching_models(weights: dict[str, Tensor]) -> list[str]:
    """Registered models with the very names and shapes of `weights`."""
    found, classes = shapes(weights), count_classes(weights)
    return [name for name in MODELS if classes and _shapes_of_model(name, classes) == found]


@cache
def _shapes_of_model(name: str, num_classes: int) -> Shapes:
    with torch.device("meta"):
        return shapes(get_model(name, num_classes).state_dict())


def _read(path: Path) -> dict[str, Any]:
    return read_checkpoint(path, leave_out_objects=True)


def _tensors(content: dict[str, Any], path: Path, prefix: str = "", drop: Sequence[str] = ()) -> dict[str, Tensor]:
    """The entries of one network, see `select_weights`; all of them are plain tensors."""
    weights = select_weights(content, path, prefix, drop)
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            kind = "an object" if isinstance(value, LeftOut) else f"a {type(value).__name__}"
            raise UserError(f"{path}: holds no network alone, {key} is {kind}; import has --prefix and --drop")
        if unusual := not_plain(value):
            raise UserError(f"{path}: {key} is {unusual}, expected a plain tensor")
    if not weights:
        raise UserError(f"{path}: holds no network, it is empty")
    return weights


def _kind(content: dict[str, Any]) -> str:
    if "format" in content and "config" in content:
        return "checkpoint of a run"
    return "weights among other things" if any(isinstance(value, dict) for value in content.values()) else "state_dict"


def _rows_of_ours(content: dict[str, Any], path: Path) -> dict[str, str]:
    config = Config.from_dict(content["config"], source=str(path))
    rows = {"run": f"{config.title} | {config.dataset.label} | seed {config.training.seed}"}
    match content:
        case {"progress": {"epoch": int(epoch), "step": int(step)}}:
            rows["progress"] = f"{epoch} of {config.training.epochs} epochs, {step} steps"
    match content:
        case {"best": {"top1": int() | float() as best, "epoch": int(epoch)}, "val": {"top1": int() | float() as last}}:
            rows["accuracy"] = f"best {best:.2f}% (epoch {epoch}), last {last:.2f}%"
    match content:
        case {"extra": dict(extra)}:
            parts = ", ".join(dict.fromkeys(str(key).split(".")[0] for key in extra))
            rows["extra"] = f"{len(extra)} entries: {parts or 'none'}"
    return rows


def _short(value: Any) -> str:
    if isinstance(value, LeftOut):
        return "an object, left out"
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
