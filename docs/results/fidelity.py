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

The published code runs in a process of its own, see published_step.py.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from published_step import CLASSES, SAMPLES, Step, outcome

from datasets.batch import Batch
from models import get_model
from utils.command import Parser, guarded
from utils.config import Config, load_config
from utils.errors import UserError
from utils.training.build import assemble
from utils.training.optim import make_optimizers
from utils.training.precision import place_task

SEED = 1029
SIZE = 32  # pixels
NEGATIVES = 16_384  # of CRD, as published
PAIRS = ("wrn_40_2-wrn_16_2", "vgg13-MobileNetV2")
DISTILLERS = ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ft", "nst", "crd")  # the published code cannot run FSP
COLUMNS = ("values", "gradients", "rounding of values", "of gradients")
COLUMNS += tuple(f"{part}, float64" for part in ("values", "gradients", "updates"))
REAL = 1e-9  # in float64, a difference above this is no rounding


class Case(NamedTuple):
    """What both codes start from; ``uniform``, ``[B, K + 1, 2]``, is what the gates are drawn from."""

    config: Config
    task: nn.Module
    batch: Batch
    uniform: Tensor
    negatives: Tensor

    def double(self) -> Case:
        """The numbers in float64."""
        batch = self.batch._replace(image=self.batch.image.double())
        return self._replace(task=copy.deepcopy(self.task).double(), batch=batch, uniform=self.uniform.double())


def make_case(config: Config, samples: int = SAMPLES) -> Case:
    """A step of `config` on noise, with `samples` training images."""
    torch.manual_seed(SEED)
    names = config.kd.student.name, config.kd.teacher.name
    student, teacher = (get_model(name, CLASSES).train() for name in names)
    with torch.no_grad():
        for _ in range(20):
            image = torch.randn(16, 3, SIZE, SIZE)
            student(image), teacher(image)
    labels, size = torch.arange(samples) % CLASSES, config.training.batch_size
    data = SimpleNamespace(labels=labels, image_size=(SIZE, SIZE))
    task = assemble(config, student, teacher, data)
    task.policy.linear.reset_parameters()
    place_task(task, config, torch.device("cpu"), data.image_size).train()
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randperm(samples, generator=generator)[:size]
    batch = Batch(torch.randn(size, 3, SIZE, SIZE, generator=generator), labels[index], index)
    uniform = torch.rand(size, task.num_gates, 2)
    return Case(config, task, batch, uniform, torch.randint(samples, (size, NEGATIVES)))


def tensors_by_published_name(task: nn.Module) -> dict[str, list[Tensor]]:
    """Our parameters and buffers by the names of the published modules, in the order of those."""

    def of(module: nn.Module) -> list[Tensor]:
        return list(module.state_dict(keep_vars=True).values())

    distiller, router = task.distiller, task.router
    name, spots = type(distiller).__name__, range(len(distiller.spots))
    suffix = "_{}" if name in ("AT", "NST", "VID") else ""
    found = {"module.teacher": of(task.teacher), "module.student": of(task.student), "module.policy": of(task.policy)}
    found |= {f"module.hint{suffix}".format(k): of(router.to_teacher[k]) for k in spots}
    found |= {f"module.anti_hint{suffix}".format(k): of(router.to_student[k]) for k in spots}
    if name == "FitNet":
        found["module.loss_hint"] = of(distiller.regressors)
    elif name == "CC":
        found |= {"module.cc_embed_s": of(distiller.student), "module.cc_embed_t": of(distiller.teacher)}
    elif name == "VID":
        found |= {f"criterion.kd.{k}": [distiller.rhos[k], *of(distiller.means[k])] for k in spots}
    elif name == "FT":
        found |= {"module.translator": of(distiller.translators), "module.paraphraser": of(distiller.paraphrasers)}
    elif name == "CRD":
        contrast = distiller.contrasts[0]
        found |= {"module.crd_embed_s": of(contrast.embed_student), "module.crd_embed_t": of(contrast.embed_teacher)}
        banks = contrast.student_bank, contrast.teacher_bank
        z_student, z_teacher = (float(bank.normalizer) for bank in banks)
        settings = [NEGATIVES, contrast.temperature, z_teacher, z_student, contrast.momentum]
        found["criterion.kd.contrast"] = [torch.tensor(settings, dtype=torch.float64), *(bank.rows for bank in banks)]
    return found


def our_step(case: Case) -> Step:
    """The `outcome` of one step; `case` is used up."""
    task, batch = case.task, case.batch
    optimizers = make_optimizers(task.parameter_groups(), case.config)
    routed: list[Tensor] = []
    task.router.register_forward_hook(lambda module, inputs, output: routed.append(output.detach()))
    if hasattr(task.distiller, "sampler"):
        task.distiller.sampler.forward = lambda index, amount: case.negatives
    with torch.no_grad():
        teacher_logits = task.teacher.features(batch.image)[1]
    exponential = -case.uniform.double().log()
    outputs = []
    with patch.object(torch.Tensor, "exponential_", lambda self: self.copy_(exponential)):
        for output in task(batch):
            output.loss.backward()
            outputs.append(output)
    for optimizer in optimizers.values():
        optimizer.step()
    student, policy = outputs
    values = {
        "teacher's logits": teacher_logits,
        "logits": student.logits,
        "cross-entropy": student.parts["loss/ce"],
        "distiller's loss": sum(student.parts[f"loss/{spot}"] for spot in task.gate_labels[:-1]),
        "loss at the logits": task.alpha * student.parts["loss/kl"],
        "student's loss": student.loss.detach(),
        "routed logits": routed[0],
        "routed cross-entropy": policy.parts["loss/routed_ce"],
        "policy's loss": policy.loss.detach(),
    }
    return outcome(values, tensors_by_published_name(task))


def published_step(checkout: Path, file: Path, case: Case, state: dict[str, list[Tensor]]) -> Step:
    """The published code's step, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        image, label, index = case.batch
        batch = [image, label]
        if hasattr(case.task.distiller, "sampler"):
            batch += [index, torch.cat([index[:, None], case.negatives], dim=1)]
        torch.save({"model": case.task.teacher.state_dict()}, f"{folder}/teacher.pth")
        torch.save({"batch": batch, "uniform": case.uniform, "state": state}, f"{folder}/given.pth")
        script = str(Path(__file__).resolve().with_name("published_step.py"))
        command = [sys.executable, script, str(file.resolve()), folder, str(torch.get_num_threads())]
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


def compare(checkout: Path, pair: str, distiller: str) -> str:
    """A row of the table."""
    file = checkout / "configs" / "cifar-100" / f"seed-{SEED}" / distiller / f"{pair}.yml"
    case32 = make_case(load_config(file, ["training.channels_last=false"]))  # its layout, so its rounding
    case64 = case32.double()
    ours, theirs = [], []
    for case in (case32, case64):
        before = {n: [x.detach().clone() for x in xs] for n, xs in tensors_by_published_name(case.task).items()}
        theirs.append(published_step(checkout, file, case, before))
        ours.append(our_step(case))
    compared = ((ours[0], theirs[0], math.inf), (theirs[0], theirs[1], math.inf), (ours[1], theirs[1], REAL))
    cells = [largest(one[part], other[part], real) for one, other, real in compared for part in ("values", "gradients")]
    cells.append(largest(changes(ours[1], before), changes(theirs[1], before), REAL))
    return row(distiller, pair, *cells)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder of the published repository")
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--distillers", nargs="+", default=DISTILLERS)
    arguments = parser.parse_args()
    if not (arguments.checkout / "distiller_zoo").is_dir():
        raise UserError(f"{arguments.checkout}: no checkout of the published code, it lacks distiller_zoo")
    print(row("distiller", "pair", *COLUMNS), row(*["---"] * (2 + len(COLUMNS))), sep="\n")
    for pair in arguments.pairs:
        for distiller in arguments.distillers:
            print(compare(arguments.checkout, pair, distiller), flush=True)
    files, failures = sorted((arguments.checkout / "configs").rglob("*.yml")), []
    for file in files:
        try:
            load_config(file)
        except UserError as error:
            failures.append(f"* {str(error).removeprefix(f'{arguments.checkout}/')}")
    print(f"\n{len(files) - len(failures)} of {len(files)} configs load unchanged.", *failures, sep="\n")


if __name__ == "__main__":
    guarded(main)
