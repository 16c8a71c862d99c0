"""From the names that a launcher is given (data set, seed, networks, distiller) to a config."""

from __future__ import annotations

from pathlib import Path

from utils.config.layers import COMMAND_LINE, Layers
from utils.config.names import model_label, needs_small_lr, same_family
from utils.errors import UserError, did_you_mean
from utils.registry import fold, names_in_source, spelling

SMALL_LR = 0.01
OWN_IMAGES = ("imagefolder", "csv", "parquet")  # for which no β was ever tuned
BALANCE = 0.5
LOGITS_ALONE = ("kd", "dkd", "dist", "nkd", "wttm")  # distillers without spots


def find_config(
    dataset: str,
    seed: int,
    *,
    model: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    distiller: str | None = None,
    root: str | Path = "configs",
) -> Layers:
    """The settings of ``model``, or of ``teacher``, ``student`` and ``distiller``, not yet checked.

    It is the file ``<root>/<dataset>/seed-<seed>/<single or distiller>/<names>.yml``; else the same file of another
    seed, the published one first; else it is composed from ``<root>/base/<single or distiller>.yml`` and
    ``<root>/<dataset>/base.yml`` (for distilling ``distill.yml``, where there is one). ``training.seed`` is `seed` in
    every case.

    Raises:
        UserError: there is no such data set, or names are missing.
    """
    pair = (teacher, student, distiller)
    if model and not any(pair):
        method, networks = "single", (model,)
    elif all(pair) and not model:
        method = spelling(distiller, names_in_source("distillers", "distiller")) or distiller
        networks = (teacher, student)
    else:
        raise UserError(f"{COMMAND_LINE}: give a model to train, or a teacher, a student and a distiller")
    folder = _dataset_folder(dataset, Path(root))
    file = f"{method}/{'-'.join(map(model_label, networks))}.yml"
    wanted = folder / f"seed-{seed}" / file
    folders = [folder / f"seed-{seed}", folder / "seed-1029", *sorted(folder.glob("seed-*"))]
    path = next((parent / file for parent in folders if (parent / file).is_file()), None)
    if path:
        layers = Layers(str(path))
        layers.add_file(path)
        layers.note = str(path) if path == wanted else f"{path} with training.seed={seed} (there is no {wanted})"
    else:
        layers = Layers(f"{wanted} (composed)")
        own = folder / "distill.yml"  # it names base.yml as its own base
        of_data = own if method != "single" and own.exists() else folder / "base.yml"
        bases = [base for base in (Path(root, "base", f"{method}.yml"), of_data) if base.exists()]
        parts = _compose(layers, bases, method, networks)
        layers.note = f"composed from {parts} (there is no {wanted})"
    layers.add({"training": {"seed": seed}}, COMMAND_LINE)
    return layers


def _compose(layers: Layers, bases: list[Path], method: str, networks: tuple[str, ...]) -> str:
    """Lay into `layers` what a file would say by the rules that the published files follow; its parts, in words."""
    for base in bases:
        layers.add_file(base)
    parts, student = " and ".join(map(str, bases)), networks[-1]
    if needs_small_lr(student):
        layers.add({"training": {"lr": SMALL_LR}}, layers.name)
        parts += f", training.lr {SMALL_LR} as is usual for {student}"
    if method == "single":
        layers.add({"model": {"name": student}}, layers.name)
        return parts
    teacher, _ = networks
    kd = {"teacher": {"name": teacher}, "student": {"name": student}}
    # A data set may settle homo and balance for all its pairs.
    data = layers.data
    homo = data.get("kd_loss", {}).get("homo", same_family(teacher, student))
    parts += f", homo {str(homo).lower()}"
    match data:
        case {"kd": {"balance": _}}:
            pass
        case {"dataset": {"name": str(name)}} if fold(name) in OWN_IMAGES and method not in LOGITS_ALONE:
            kd["balance"] = BALANCE
            parts += f", kd.balance {BALANCE} as for all images of one's own"
    layers.add({"kd": kd, "kd_loss": {"name": method, "homo": homo}}, layers.name)
    return parts


def _dataset_folder(dataset: str, root: Path) -> Path:
    known = sorted(path.parent.name for path in root.glob("*/base.yml"))
    if found := spelling(dataset, known):
        return root / found
    close = did_you_mean(dataset, known) or ":"
    there = ", ".join(known) or "none"
    raise UserError(f"{COMMAND_LINE}: no dataset {dataset!r} in {root}{close} those with a base.yml are {there}")
