"""Look into checkpoints, take students out of them, and check other people's weights against a network.

python -m utils.convert show run/cifar-100/1029/vgg13/ckpt/best.pth
python -m utils.convert export run/cifar-100/1029/adaptive-at/vgg13-vgg8/ckpt/best.pth vgg8.safetensors
python -m utils.convert import ckpt_epoch_240.pth --model vgg13 teacher.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from models import MODELS, find_builder
from utils.command import Parser, guarded, whole_number
from utils.config import Config
from utils.config.yaml_text import parse_yaml
from utils.errors import UserError, doing, printable
from utils.files import replacing
from utils.run_folder.checkpoint import checkpoint_file, is_ours, read_checkpoint, save_atomically
from utils.run_folder.weights import EMA_HELP, assign_weights, average_instead, find_weights, flattened, unusual

_ENDINGS = (".pth", ".pt", ".safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    print(run(**options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m utils.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="say what is in a checkpoint, and list its entries")
    show.set_defaults(run=describe)
    export = commands.add_parser("export", help="write the network alone: the student, or a model trained alone")
    export.set_defaults(run=export_network)
    export.add_argument("--ema", action="store_true", dest="average", help=EMA_HELP)
    imported = commands.add_parser(
        "import", help="check somebody's weights against a model and write them as a checkpoint of ours"
    )
    imported.set_defaults(run=import_network)
    imported.add_argument(
        "--model",
        required=True,
        dest="name",
        help="a model of models/, timm/<name>, or an import path such as torchvision.models.resnet34",
    )
    imported.add_argument("--num-classes", type=whole_number(2), help="default: as many as the file has")
    imported.add_argument("--prefix", help="of several sets of entries that fit, take the one under this, e.g. student")
    imported.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave this entry out, and all below it; repeatable"
    )
    imported.add_argument("--kwargs", type=_mapping, default={}, help="arguments of the model, e.g. '{depth: 3}'")
    for command in (show, export, imported):
        command.add_argument("path", type=Path, metavar="FILE", help="a checkpoint, state_dict or safetensors")
    for command in (export, imported):
        command.add_argument("out", type=Path, metavar="OUT", help="the file to write; must not exist")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    value = parse_yaml(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {text!r}, must be a mapping")
    return value


def describe(path: Path) -> str:
    """What is in a checkpoint: a summary, then every tensor with its shape and data type."""
    content, path = read_checkpoint(path), checkpoint_file(path)
    tensors = {key: value for key, value in flattened(content).items() if isinstance(value, Tensor)}
    classes = count_classes(content)
    rows = {
        "file": f"{path}, {path.stat().st_size / 1e6:.1f} MB",
        "classes": str(classes or "unknown, there is no matrix that could be a classifier"),
        "tensors": f"{len(tensors)}, {sum(value.numel() for value in tensors.values()):,} numbers",
    }
    if is_ours(content) and isinstance(content.get("config"), dict):
        config = Config.from_dict(content["config"], source=str(path), written=True)
        rows["run"] = f"{config.title} | {config.dataset.label} | seed {config.training.seed}"
    else:
        rows["network"] = ", ".join(_matching_models(tensors, path, classes)) or "none of the registered models"
    rows |= {str(key): _short(value) for key, value in content.items() if not isinstance(value, Tensor)}
    entries = {key: unusual(value) or f"{tuple(value.shape)} {value.dtype}" for key, value in tensors.items()}
    return f"{_aligned(rows)}\n\n{_aligned(entries)}".rstrip()


def export_network(path: Path, out: Path, average: bool = False) -> str:
    """Write a checkpoint's network, or the moving average of it, as a bare state_dict: PyTorch's format or safetensors.

    Returns:
        a line that says what was done.

    Raises:
        UserError: `out` is there, or the ending is of neither; or `path` holds no network.
    """
    _refuse_existing(out)
    if out.suffix not in _ENDINGS:
        raise UserError(f"{out}: must end in one of {', '.join(_ENDINGS)}")
    content = read_checkpoint(path)
    if average:
        content = average_instead(content, path)
    content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    entries = flattened(content)
    if not entries:
        raise UserError(f"{path}: holds no network, it is empty")
    for key, value in entries.items():
        if problem := unusual(value) if isinstance(value, Tensor) else f"a {type(value).__name__}":
            raise UserError(f"{path}: holds no network alone, {key} is {problem}")
    # Copies: safetensors takes no tensors that share their memory, and a view would be saved with all it is a view of.
    weights = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in entries.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix != ".safetensors":
        save_atomically(weights, out)
    else:
        with replacing(out) as file:
            file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    return f"{out}: {len(weights)} entries"


def import_network(
    path: Path,
    out: Path,
    name: str,
    *,
    num_classes: int | None = None,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    kwargs: dict[str, Any] | None = None,
) -> str:
    """Write somebody's weights as a checkpoint of ours, which says whose network's they are.

    ``kd.teacher.checkpoint`` and ``model.checkpoint`` take the file itself, too; this checks it beforehand.

    Args:
        path: the file.
        out: the file to write.
        name, kwargs: of the model, see `models.get_model`.
        num_classes: its classes; None: those of the file's last matrix.
        prefix: of several sets of entries that fit, the one that is meant.
        drop: names of entries to leave out, with all below them.

    Returns:
        a line that says what was done.

    Raises:
        UserError: they are not the weights of that model; nothing is written.
    """
    _refuse_existing(out)
    content = read_checkpoint(path)
    content = flattened(content) if drop else content
    for word in drop:
        left = {key: value for key, value in content.items() if not f"{key}.".startswith(f"{word}.")}
        if len(left) == len(content):
            raise UserError(f"{path}: no entry is called {word!r}, or begins with {word + '.'!r}")
        content = left
    classes = num_classes or count_classes(content)
    if classes is None:
        raise UserError(f"{path}: no matrix in it could be a classifier; --num-classes says how many classes there are")
    build, what = find_builder(name), f"{name} with {classes} classes"
    with doing(f"building {what}"):
        model = build(num_classes=classes, **(kwargs or {}))
    weights, taken = find_weights(model, content, path, what, prefix=prefix, key="--prefix")
    assign_weights(model, weights, f"{path}: not the weights of {what}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomically({"model": model.state_dict(), "name": name, "num_classes": classes, "source": str(path)}, out)
    return f"{out}: {what} ({taken})"


def count_classes(content: dict[str, Any]) -> int | None:
    """Rows of the last matrix, which in a network that classifies is the classifier's; None if there is no matrix."""
    network = content["model"] if is_ours(content) else content  # a run's checkpoint ends with other matrices
    plain = [value for value in flattened(network).values() if isinstance(value, Tensor) and not unusual(value)]
    return next((len(value) for value in reversed(plain) if value.ndim == 2), None)


def _matching_models(tensors: dict[str, Tensor], path: Path, classes: int | None) -> list[str]:
    """Registered models whose weights are in a file."""
    names = []
    for name in MODELS if classes else ():
        with suppress(UserError), torch.device("meta"):
            find_weights(MODELS.get(name)(num_classes=classes), tensors, path)
            names.append(name)
    return names


def _short(value: Any) -> str:
    """A plain value or a few of them, or how much there is."""
    if isinstance(value, dict) and not value and getattr(value, "__dict__", None):
        return f"an object with {', '.join(vars(value))}"[:80]
    if isinstance(value, dict) and all(item is None or isinstance(item, str | int | float) for item in value.values()):
        return str(value)[:80]
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, dict | list | tuple) else str(value)[:80]


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(printable(f"{key:<{width}}  {value}") for key, value in rows.items())


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists already; name another file or remove it first")


if __name__ == "__main__":
    guarded(main)
