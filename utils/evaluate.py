"""Measure the accuracy and the cost of a checkpoint's network, and of a distilled student's teacher beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from utils.command import Parser, guarded
from utils.errors import UserError, doing
from utils.files import check_writable, refuse_to_replace, write_bytes, write_text
from utils.report.table import markdown
from utils.run_folder.layout import Layout
from utils.training.accuracy import evaluate
from utils.training.facts import flops
from utils.training.precision import refuse_precision
from utils.training.restore import Restored, add_arguments, restore_from

LATENCY_BATCHES = (1, 64)
TIMED = 15  # forward passes; the timer runs two before each, to warm up
FILES = ("evaluation.json", "per_class.csv", "confusion.csv", "confusion.png")


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: their number.
        megabytes: parameters and buffers, as stored.
        gflops: of one image's forward pass, in 10⁹; a multiplication and an addition count as two.
        milliseconds: median forward pass by batch size, on this machine.
    """

    parameters: int
    megabytes: float
    gflops: float
    milliseconds: dict[int, float]


@dataclass(frozen=True)
class Scores:
    """What a network achieves on the validation images.

    Attributes:
        top1, top5: percent; no top-5 below six classes.
        predicted: class of each image in the order of the split, int64 ``[N]``.
        confusion: ``[num_classes, num_classes]`` counts; true class by row, predicted by column.
        test: ``top1`` and ``class_mean`` on the test images; None where there are none.
    """

    top1: float
    top5: float | None
    predicted: Tensor
    confusion: Tensor
    test: dict[str, float] | None = None

    @property
    def class_mean(self) -> float:
        """Mean of the classes' top-1 accuracies, in percent."""
        return fmean(accuracy for accuracy in self.per_class() if accuracy is not None)

    def values(self) -> dict[str, float | None]:
        """The accuracies under the names that files have."""
        test = {f"test_{name}": value for name, value in (self.test or {}).items()}
        return {"top1": self.top1, "top5": self.top5, "class_mean": self.class_mean, **test}

    def per_class(self) -> list[float | None]:
        """Accuracy of every class in percent; None for one without images."""
        counts = self.confusion.sum(dim=1)
        return [100 * hit / n if n else None for hit, n in zip(self.confusion.diag().tolist(), counts.tolist())]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m utils.evaluate", description=__doc__)
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, e.g. dataset.root=data")
    parser.add_argument("--no-teacher", action="store_true", help="leave the teacher out")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: evaluation/ in the run's folder)")
    options = parser.parse_intermixed_args(arguments)
    restored = restore_from(options, options.overrides)
    refuse_precision(restored.device, restored.config.training.precision)
    out = Path(options.out) if options.out else default_folder(restored.path)
    refuse_to_replace([out / name for name in FILES], out / FILES[0], mark='"gflops"')
    check_writable(out)
    results = measure_networks(restored, teacher=not options.no_teacher)
    print(f"{restored.path}\n{markdown(summary_table(results))}\n")
    write(out, results, restored)
    print(f"{out}: {', '.join(FILES)}")
    return 0


def measure_networks(restored: Restored, *, teacher: bool = True) -> dict[str, tuple[Scores, Cost]]:
    """The network of a checkpoint, and beside it the teacher of a distilled one."""
    networks = {restored.config.student.title: restored.student()}
    if restored.config.kd and teacher:
        networks[f"{restored.config.kd.teacher.title} (teacher)"] = restored.teacher()
    return {name: (scores(net, restored), cost(net, restored)) for name, net in networks.items()}


def scores(model: nn.Module, restored: Restored) -> Scores:
    """Run `model` over the validation images, in the precision of its training."""
    predicted: list[Tensor] = []
    evaluate_on = partial(evaluate, model, device=restored.device, autocast=restored.autocast)
    means = evaluate_on(restored.val, after_batch=lambda logits, label: predicted.append(logits.argmax(dim=1)))
    if not math.isfinite(means["loss/total"]):
        raise UserError(
            f"{restored.path}: the logits for the validation images are not finite, so there is no accuracy; "
            "the running statistics of its BatchNorms may not fit its weights"
        )
    classes, found = restored.source.num_classes, torch.cat(predicted).cpu()
    cells = restored.val.labels.cpu() * classes + found
    confusion = cells.bincount(minlength=classes * classes).view(classes, classes)
    test = None
    if restored.test is not None:
        on_test = evaluate_on(restored.test)
        test = {name: on_test[name] for name in ("top1", "class_mean")}
    return Scores(means["top1"], means.get("top5"), found, confusion, test)


def cost(model: nn.Module, restored: Restored) -> Cost:
    """Measure `model` on images of the data set's size."""
    tensors = [*model.parameters(), *model.buffers()]
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        megabytes=sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        gflops=flops(model, restored.source.image_size, restored.device) / 1e9,
        milliseconds={n: latency(model, n, restored) for n in LATENCY_BATCHES},
    )


@torch.inference_mode()
def latency(model: nn.Module, batch: int, restored: Restored, threads: int | None = None) -> float:
    """Median time of a forward pass in milliseconds, in the precision of the training, after a warm-up.

    Args:
        threads: of PyTorch on a CPU; None: as many as it uses.
    """
    images = torch.zeros(batch, 3, *restored.source.image_size, device=restored.device)
    names = {"model": model, "images": images, "autocast": restored.autocast}
    timer = Timer("with autocast: model(images)", globals=names, num_threads=threads or torch.get_num_threads())
    return 1000 * median(timer.timeit(1).median for _ in range(TIMED))


def summary_table(results: dict[str, tuple[Scores, Cost]]) -> pd.DataFrame:
    """One column per network."""
    scored, costs = zip(*results.values())
    rows = score_rows(scored)
    rows.append(["parameters", *(f"{item.parameters:,}" for item in costs)])
    rows.append(["weights (MB)", *(f"{item.megabytes:.2f}" for item in costs)])
    rows.append(["GFLOPs per image (2 x multiply-adds)", *(f"{item.gflops:.4f}" for item in costs)])
    for batch in LATENCY_BATCHES:
        rows.append([f"latency, batch {batch} (ms, median)", *(f"{c.milliseconds[batch]:.2f}" for c in costs)])
    return pd.DataFrame(rows, columns=["", *results])


def score_rows(scored: Sequence[Scores]) -> list[list[str]]:
    """What each of the networks achieves, one column per network after a heading."""
    rows = [["top-1 (%)", *(f"{item.top1:.2f}" for item in scored)]]
    if scored[0].top5 is not None:
        rows.append(["top-5 (%)", *(f"{item.top5:.2f}" for item in scored)])
    rows.append(["mean of the classes' top-1 (%)", *(f"{item.class_mean:.2f}" for item in scored)])
    if scored[0].test is not None:
        rows.append(["test top-1 (%)", *(f"{item.test['top1']:.2f}" for item in scored)])
        rows.append(["test, mean of the classes' (%)", *(f"{item.test['class_mean']:.2f}" for item in scored)])
    return rows


def default_folder(checkpoint: Path) -> Path:
    """``evaluation/`` in the run's folder, or beside a checkpoint from elsewhere."""
    return (Layout.of_checkpoint(checkpoint) or Layout(checkpoint.parent)).evaluation


def write(out: Path, results: dict[str, tuple[Scores, Cost]], restored: Restored) -> None:
    """Write every figure of every network, and the first one's confusion matrix and its picture."""
    from utils.report.heatmaps import confusion_figure  # brings Matplotlib
    from utils.report.style import png

    names = restored.source.class_names
    first = next(iter(results.values()))[0]
    values = {name: scored.values() | asdict(spent) for name, (scored, spent) in results.items()}
    accuracies = zip(names, *(scored.per_class() for scored, _ in results.values()))
    with doing(f"writing to {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "evaluation.json", json.dumps(values, indent=2) + "\n")
        write_text(out / "per_class.csv", pd.DataFrame(accuracies, columns=["class", *results]).to_csv(index=False))
        confusion = pd.DataFrame(first.confusion.numpy(), index=names, columns=names)
        write_text(out / "confusion.csv", confusion.to_csv(index_label="true \\ predicted"))
        write_bytes(out / "confusion.png", png(confusion_figure(first.confusion.numpy(), names, next(iter(results)))))


if __name__ == "__main__":
    guarded(main)
