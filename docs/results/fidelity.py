"""Compare one training step of this project with one of the published code, number by number.

    python docs/results/fidelity.py CHECKOUT [--pairs PAIR ...] [--distillers NAME ...]

CHECKOUT is one of github.com/zju-vipa/spot-adaptive-pytorch. Both codes take one step under its config, on the CPU,
from the same weights, on the same batch, with the same noise of the gates and the same negatives of CRD. Prints a
Markdown table, and how many of its configs this project loads unchanged.

The weights are random, the running statistics of BatchNorm near those of the maps. The policy starts without the bias
of homogeneous pairs, so that about half of the samples are chosen at every spot.

A difference is the length of ours - theirs relative to that of theirs; a cell has the largest. *Values* are the logits
of teacher, student and routed network, every term of the losses and both losses; *gradients* and *updates* are one
vector for each module. *Rounding* is the difference of the published code in float32 from itself in float64. What
differs in float64 by more than rounding is named. A row takes about half a minute, one of NST several.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from fidelity_ours import NEGATIVES, Case, take_step, tensors_by_published_name
from fidelity_published import Step

from models import get_model
from utils.benchmark.cases import SEED, Conditions, Pair
from utils.command import Parser, guarded
from utils.config import load_config
from utils.errors import UserError
from utils.training.build import assemble
from utils.training.device import place_task

PAIRS = ("wrn_40_2-wrn_16_2", "vgg13-MobileNetV2")
DISTILLERS = ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ft", "nst", "crd")  # the published code cannot run FSP
CPU = torch.device("cpu")
COLUMNS = ("values", "gradients", "rounding of values", "of gradients")
COLUMNS += tuple(f"{part}, float64" for part in ("values", "gradients", "updates"))
REAL = 1e-9  # in float64, a difference above this is no rounding


def check_published(folder: Path) -> None:
    """Raise a UserError unless the folder is a checkout of the published code."""
    missing = next((name for name in ("train.py", "configs", "distiller_zoo") if not (folder / name).exists()), None)
    if missing:
        raise UserError(f"{folder}: not a checkout of the published code, it lacks {missing}")


def make_case(file: Path, pair: Pair) -> Case:
    config = load_config(file, ["training.channels_last=false"])  # the published code's layout, so its rounding
    conditions = Conditions(CPU, batch_size=config.training.batch_size)
    torch.manual_seed(SEED)
    student, teacher = (get_model(name, conditions.num_classes).train() for name in (pair.student, pair.teacher))
    with torch.no_grad():
        for _ in range(20):
            image = torch.randn(16, 3, conditions.size, conditions.size)
            student(image), teacher(image)
    data = SimpleNamespace(labels=conditions.labels(), image_size=(conditions.size, conditions.size))
    task = assemble(config, student, teacher, data)
    task.policy.linear.reset_parameters()
    place_task(task, config, CPU, data.image_size).train()
    batch = conditions.batch()
    uniform = torch.rand(len(batch.label), task.num_gates, 2)
    return Case(config, task, batch, uniform, torch.randint(conditions.samples, (len(batch.label), NEGATIVES)))


def published_step(checkout: Path, file: Path, case: Case, state: dict[str, list[Tensor]]) -> Step:
    """The published code's step, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        image, label, index = case.batch
        batch = [image, label]
        if hasattr(case.task.distiller, "sampler"):
            batch += [index, torch.cat([index[:, None], case.negatives], dim=1)]
        torch.save({"model": case.task.teacher.state_dict()}, f"{folder}/teacher.pth")
        torch.save(list(case.batch), f"{folder}/batch.pth")
        torch.save({"batch": batch, "uniform": case.uniform, "state": state}, f"{folder}/given.pth")
        job = {"config": str(file.resolve()), "files": folder, "negatives": NEGATIVES}
        job |= {"num_classes": 100, "samples": Conditions(CPU).samples, "threads": torch.get_num_threads()}
        command = [sys.executable, str(Path(__file__).with_name("fidelity_published.py").resolve()), json.dumps(job)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{file}: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}")
        return torch.load(f"{folder}/taken.pth")


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative difference of two lists of tensors as vectors; infinite if only the published one is zero."""
    error = math.hypot(*(float((a.double() - b.double()).norm()) for a, b in zip(ours, theirs, strict=True)))
    length = math.hypot(*(float(b.double().norm()) for b in theirs))
    if math.isnan(error) or (error and not length):
        return math.inf
    return error / length if error else 0.0


def largest(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]], real: float = math.inf) -> str:
    """A cell of the table: the largest difference, with its name if it is above `real`."""
    value, name = max((difference(ours[name], theirs[name]), name) for name in theirs)
    return f"{value:.0e} ({name})" if value > real else f"{value:.0e}"


def changes(step: Step, before: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """By how much the step has changed every parameter and buffer."""
    return {name: [new.double() - old for new, old in zip(step["state"][name], before[name])] for name in before}


def compare(checkout: Path, pair: Pair, distiller: str) -> str:
    """A row of the table."""
    file = checkout / "configs" / "cifar-100" / f"seed-{SEED}" / distiller / f"{pair}.yml"
    case32 = make_case(file, pair)
    case64 = case32.double()
    ours, theirs = [], []
    for case in (case32, case64):
        before = {n: [x.detach().clone() for x in xs] for n, xs in tensors_by_published_name(case.task).items()}
        theirs.append(published_step(checkout, file, case, before))
        ours.append(take_step(case))
    compared = ((ours[0], theirs[0], math.inf), (theirs[0], theirs[1], math.inf), (ours[1], theirs[1], REAL))
    cells = [largest(one[part], other[part], real) for one, other, real in compared for part in ("values", "gradients")]
    cells.append(largest(changes(ours[1], before), changes(theirs[1], before), REAL))
    return row(distiller, str(pair), *cells)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def count_configs(checkout: Path) -> str:
    """How many of the published configs load, and why the others do not."""
    files, failures = sorted((checkout / "configs").rglob("*.yml")), []
    for file in files:
        try:
            load_config(file)
        except UserError as error:
            failures.append(f"* {str(error).removeprefix(f'{checkout}/')}")
    return "\n".join([f"{len(files) - len(failures)} of {len(files)} configs load unchanged.", *failures])


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder of the published repository")
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--distillers", nargs="+", default=DISTILLERS)
    arguments = parser.parse_args()
    check_published(arguments.checkout)
    print(row("distiller", "pair", *COLUMNS), row(*["---"] * (2 + len(COLUMNS))), sep="\n")
    for pair in map(Pair.parse, arguments.pairs):
        for distiller in arguments.distillers:
            print(compare(arguments.checkout, pair, distiller), flush=True)
    print(f"\n{count_configs(arguments.checkout)}")


if __name__ == "__main__":
    guarded(main)
