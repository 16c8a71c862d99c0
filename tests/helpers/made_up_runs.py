"""Run folders as training leaves them, with made-up figures, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from utils.config import Config

MIDDLE = ("f1", "f2", "f3")
SPOTS = {"at": MIDDLE, "vid": MIDDLE, "fitnet": ("f2",), "sp": ("f3",), "crd": ("f4",), "rkd": ("f4",), "kd": ()}
BETA = 100.0
GAIN = {"fixed": 2.0, "adaptive": 2.5, "anti": 0.5, "random": 1.5, "shuffled": 1.8, "single": 0.0}


def write_run(
    root: Path,
    *,
    selection: str,
    seed: int = 1029,
    teacher: str = "resnet20",
    student: str = "resnet8",
    distiller: str = "at",
    dataset: str = "digits",
    epochs: int = 4,
    done: int | None = None,
    accuracies: Sequence[float] | None = None,
    teacher_top1: float | None = 75.0,
    test_top1: float | None = None,
    num_classes: int = 10,
    settings: dict | None = None,
    facts: bool = True,
) -> Path:
    """Write one run and give its folder.

    Args:
        selection: ``"single"`` for a network alone, which is `student`.
        done: epochs that it got to; fewer than `epochs` leaves it unfinished.
        accuracies: validation top-1 per epoch; made up if not given.
        settings: further sections of the config.
        facts: whether the run wrote ``facts.json``; older ones did not.
    """
    done = epochs if done is None else done
    networks = {"model": {"name": student}}
    if selection != "single":
        kd = {"teacher": {"name": teacher}, "student": {"name": student}, "selection": selection}
        networks = {"kd": kd, "kd_loss": {"name": distiller}}
    training = {"epochs": epochs, "seed": seed}
    sections = {"dataset": {"name": dataset}, "training": training, "run": {"root": str(root)}} | networks
    for name, section in (settings or {}).items():
        sections[name] = sections.get(name, {}) | section
    config = Config.from_dict(sections, written=True)
    folder = config.run_dir
    (folder / "ckpt").mkdir(parents=True)
    (folder / "ckpt/last.pth").touch()
    (folder / "config.yml").write_text(yaml.safe_dump(config.to_dict()))
    if facts:
        (folder / "facts.json").write_text(json.dumps(_facts(selection, distiller, num_classes)))
    noise = np.random.default_rng([seed, *map(ord, teacher + student + distiller + selection)])
    gates = [] if selection == "single" else [*SPOTS[distiller], "logits"]
    if accuracies is None:
        rise = 1 - np.exp(-np.arange(1, done + 1) / epochs * 5)
        accuracies = (70 + GAIN[selection]) * rise + noise.normal(0, 0.4, done)
    records = [_record(k, epochs, float(top1), gates, selection) for k, top1 in enumerate(accuracies, 1)]
    _write_lines(folder / "metrics.jsonl", records)
    if gates:
        _write_lines(folder / "gates.jsonl", [_gate_line(k, gates, num_classes, records, noise) for k in range(done)])
    if done == epochs:
        result = {"best_top1": max(accuracies), "last_top1": accuracies[-1]}
        result |= {"teacher_top1": teacher_top1} if gates and teacher_top1 is not None else {}
        result |= {} if test_top1 is None else {"test_top1": test_top1}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_samples(folder: Path, epochs: int, distilled: np.ndarray, labels: Sequence[str]) -> None:
    """How often, in `epochs` epochs, every sample was distilled at each gate, ``[N, K + 1]``."""
    (folder / "gates").mkdir(exist_ok=True)
    counts = {"distilled": distilled.astype(np.int32), "seen": np.full(len(distilled), epochs, dtype=np.int32)}
    np.savez_compressed(folder / "gates" / f"epoch-{epochs}.npz", **counts, labels=np.array(labels))


def _facts(selection: str, distiller: str, num_classes: int) -> dict:
    known = {"train_images": 776, "val_images": 1021, "classes": num_classes, "image_size": [32, 32]}
    known |= {"parameters": 78_042, "flops": 25_003_264, "device": "CPU, 2 threads", "weights": {}}
    if selection == "single":
        return known
    weights = {f"loss/{spot}": [BETA, 0] for spot in SPOTS[distiller]} | {"loss/kl": [1.0, 0]}
    return known | {"teacher_parameters": 272_474, "teacher_flops": 81_625_600, "weights": weights}


def _record(epoch: int, epochs: int, top1: float, gates: list[str], selection: str) -> dict:
    progress = epoch / epochs
    train = {"loss/total": 4.5 - 3 * progress}
    if gates:
        train |= {"loss/ce": 4.4 - 3.8 * progress, "loss/kl": 2.2 - 2 * progress, "loss/routed_ce": 3 - 2 * progress}
        spots = {f"loss/{spot}": 0.01 / (k + 1) * (1.1 - progress) for k, spot in enumerate(gates[:-1])}
        train |= spots | {"loss/total": train["loss/ce"] + train["loss/kl"] + BETA * sum(spots.values())}
        for k, gate in enumerate(gates):
            share = 1 - 0.7 * progress * k / max(len(gates) - 1, 1)
            shares = {"adaptive": share, "anti": 1 - share, "fixed": 1.0, "random": 0.5, "shuffled": share}
            train[f"gate/{gate}"] = shares[selection]
    val = {"loss/total": 4.4 - 3.2 * progress, "top1": top1, "top5": min(100.0, top1 + 15)}
    record = {"phase": "train", "epoch": epoch, "epochs": epochs, "global_epoch": epoch, "lr": {"student": 0.05}}
    return record | {"train": train | {"top1": top1, "top5": top1}, "val": val, "seconds": 2.0}


def _gate_line(k: int, gates: list[str], num_classes: int, records: list[dict], noise: np.random.Generator) -> dict:
    means = np.array([records[k]["train"][f"gate/{gate}"] for gate in gates])
    classes = np.clip(means + noise.normal(0, 0.12, (num_classes, len(gates))), 0, 1).round(4)
    return {"global_epoch": k + 1, "gates": gates, "classes": classes.tolist()}


def _write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
