"""One training step of this project, with its numbers under the names that the published code gives them."""

from __future__ import annotations

import copy
from typing import NamedTuple
from unittest.mock import patch

import torch
from fidelity_published import Step, outcome
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from utils.config import Config
from utils.training.optim import make_optimizers

NEGATIVES = 16_384  # of CRD, as published


class Case(NamedTuple):
    """What both codes start from; ``uniform``, ``[B, K + 1, 2]``, is what the gates are drawn from."""

    config: Config
    task: SpotAdaptiveDistillation
    batch: Batch
    uniform: Tensor
    negatives: Tensor

    def double(self) -> Case:
        """The same numbers in float64."""
        batch = self.batch._replace(image=self.batch.image.double())
        return self._replace(task=copy.deepcopy(self.task).double(), batch=batch, uniform=self.uniform.double())


def tensors_by_published_name(task: SpotAdaptiveDistillation) -> dict[str, list[Tensor]]:
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


def take_step(case: Case) -> Step:
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
