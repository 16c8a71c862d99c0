"""Spot-adaptive knowledge distillation: any distiller, under a policy that says where to distil.

Song, Chen, Ye, Song, "Spot-adaptive Knowledge Distillation", IEEE TIP 2022, arXiv 2205.02399.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Shape, Spot, check_option, scalar
from distillers.label_loss import LabelLoss, Targets
from distillers.logits import LOGIT_LOSSES, LogitLoss
from distillers.spot_adaptive.ramp import Ramp
from distillers.task import Task, TaskOutput
from models.staged import StagedModel
from utils.errors import UserError

if TYPE_CHECKING:
    from distillers.spot_adaptive.policy import Policy

Selection = Literal["adaptive", "anti", "fixed", "random"]


class SpotAdaptiveDistillation(Task):
    """The student's loss at the chosen spots, and the routing loss that teaches the policy to choose.

    The two losses have disjoint parameters and no gradient crosses between them. They are yielded one after the other,
    see `Task`: the routed pass begins when the student's activations are gone.

    Args:
        student, teacher: the networks; the teacher is frozen and stays in evaluation mode.
        distiller: what to distil.
        student_shapes, teacher_shapes: shape of every feature, batch dimension left out.
        selection: ``adaptive``, the policy's gates; ``anti``, their inverse (the policy learns in the same way);
            ``fixed``, every gate 1, which is the plain distiller; ``random``, fair coins. The last two have no policy.
        homogeneous: teacher and student are of one family.
        alpha, beta: weights of the loss at the logits and of the distiller's losses.
        gamma: how much more (less) a routed loss above (below) the student's counts for the policy.
        logit_loss: what to match at the logits; None for what the distiller says, at temperature 4.
        warmup_epochs: over how many epochs alpha and beta grow to their full values, see `start_epoch`; None for what
            the loss at the logits and the distiller say, each for its own weight.
        gate_temperature: of the Gumbel-softmax.
        routing_share: part of the batch that is routed, the first ``ceil(share * B)`` samples but at least two, at this
            share of the cost. They are a random sample, so the gradient of the routed cross-entropy is the same on
            average, but for gamma and the adapters' BatchNorm, which look at fewer samples.
        processes: how many share each batch, every one with a task of its own.
        label_loss: cross-entropy of the student and of the routed network alike; by default that alone. Both networks
            see the images that it mixes; the distiller and the loss at the logits, the label of each image itself.

    Raises:
        UserError: there is no such selection, or a temperature is not above 0.
    """

    def __init__(
        self,
        student: StagedModel,
        teacher: StagedModel,
        distiller: Distiller,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        selection: Selection = "adaptive",
        homogeneous: bool = False,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        logit_loss: LogitLoss | None = None,
        warmup_epochs: int | None = None,
        gate_temperature: float = 5.0,
        routing_share: float = 1.0,
        processes: int = 1,
        label_loss: LabelLoss | None = None,
    ):
        super().__init__()
        if selection not in get_args(Selection):
            raise UserError(f"selection is {selection!r}, expected one of {', '.join(get_args(Selection))}")
        check_option("gate_temperature", gate_temperature, lambda value: value > 0, "a number above 0", key="kd")
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.distiller = distiller
        self.label_loss = label_loss or LabelLoss()
        self.selection = selection
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.logit_loss: LogitLoss = logit_loss or LOGIT_LOSSES.get(distiller.logit_loss)()
        own = [self.logit_loss.warmup_epochs, distiller.warmup_epochs]
        self.alpha_ramp, self.beta_ramp = map(Ramp, own if warmup_epochs is None else 2 * [warmup_epochs])
        self.gate_temperature = gate_temperature
        self.routing_share, self.processes = routing_share, processes
        self.num_gates = len(distiller.spots) + 1
        self.gate_labels = [spot_label(spot) for spot in distiller.spots] + ["logits"]
        self.policy: Policy | None = None
        if selection in ("adaptive", "anti"):
            # Imported here, so that the plain distiller loads nothing of the routing.
            from distillers.spot_adaptive.frozen import frozen_twin
            from distillers.spot_adaptive.policy import Policy
            from distillers.spot_adaptive.routing import Router

            self.policy = Policy(teacher_shapes[-1][0], student_shapes[-1][0], self.num_gates, homogeneous)
            self.router = Router(distiller.spots, student_shapes, teacher_shapes)
            # In a tuple, so that it is no submodule: it would double the student in state_dict and parameters.
            self._twin = (frozen_twin(student),)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        of_logits = self.logit_loss.parameters()
        groups = {"student": [*self.student.parameters(), *self.distiller.main_parameters(), *of_logits]}
        if self.policy is not None:
            groups["agent"] = [*self.policy.parameters(), *self.router.parameters()]
        return groups

    def start_epoch(self, epoch: int) -> None:
        for ramp in (self.alpha_ramp, self.beta_ramp):
            ramp.start_epoch(epoch)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.policy is not None:  # moving the student gave it new tensors
            from distillers.spot_adaptive.frozen import tie

            tie(self._twin[0], self.student)
        return self

    def forward(self, batch: Batch) -> Iterator[TaskOutput]:
        """The student's loss, then the policy's; ``parts`` has every term, and the share of samples distilled at each
        spot."""
        batch, targets = self.label_loss.mix(Batch(*batch))  # loaders of users may give lists
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher.features(batch.image)
        output, gates = self._distil(batch, targets, teacher_features, teacher_logits)
        if self.policy is None:
            yield output
            return
        start = self.router.start(teacher_features, teacher_logits)
        del teacher_features
        yield output
        yield self._route(batch, targets, start, gates, output)

    def _distil(
        self, batch: Batch, targets: Targets, teacher_features: list[Tensor], teacher_logits: Tensor
    ) -> tuple[TaskOutput, Tensor]:
        """The student's loss ``CE + beta * spots + alpha * logits``, and the gates with the policy's gradient."""
        features, logits = self.student.features(batch.image)
        gates = self.draw_gates(teacher_features[-1], features[-1])
        chosen = self.choose(gates)
        ce = self.label_loss(logits, targets)
        spots = self.distiller(features, teacher_features, chosen[:, :-1], batch)
        at_logits = scalar(
            self.logit_loss(logits, teacher_logits, chosen[:, -1], batch),
            f"loss at the logits {type(self.logit_loss).__name__}: forward",
        )
        loss = ce + self.beta_ramp(self.beta * spots.sum()) + self.alpha_ramp(self.alpha * at_logits)
        parts = {"loss/total": loss, "loss/ce": ce, f"loss/{self.logit_loss.label}": at_logits}
        parts |= {f"loss/{label}": spot for label, spot in zip(self.gate_labels, spots.unbind())}
        parts |= {f"gate/{label}": share for label, share in zip(self.gate_labels, chosen.mean(dim=0).unbind())}
        parts = {name: part.detach() for name, part in parts.items()}
        return TaskOutput(loss, parts, logits.detach(), chosen, targets.dominant), gates

    def _route(self, batch: Batch, targets: Targets, start: Tensor, gates: Tensor, student: TaskOutput) -> TaskOutput:
        """The policy's loss, from the routed pass of the samples that `routing_share` leaves."""
        size = len(batch.label)
        count = min(size, max(2, math.ceil(self.routing_share * size - 1e-9)))  # 0.1 * 30 is 3, not 3.0000000000000004
        targets = targets.first(count)
        routed = self.router(batch.image[:count], self._twin[0], self.teacher, start[:count], gates[:count])
        routed_ce = self.label_loss(routed, targets)
        student_ce = student.parts["loss/ce"]
        if count < size:
            student_ce = self.label_loss(student.logits[:count], targets)
        loss = routing_loss(routed_ce, student_ce, gates[:, -1], self.gamma, self.processes)
        return TaskOutput(loss, {"loss/routed_ce": routed_ce.detach(), "loss/policy": loss.detach()})

    def draw_gates(self, teacher_vector: Tensor, student_vector: Tensor) -> Tensor:
        """Gates ``[B, K + 1]`` of the selection; those of the policy carry its gradient."""
        size = (student_vector.shape[0], self.num_gates)
        device = student_vector.device
        if self.policy is not None:
            with torch.autocast(device.type, enabled=False):
                return self.policy.draw_gates(teacher_vector, student_vector, self.gate_temperature)
        if self.selection == "random":
            return torch.randint(2, size, device=device, dtype=torch.float32)
        return torch.ones(size, device=device)

    def choose(self, gates: Tensor) -> Tensor:
        """Where the student distils, ``[B, K + 1]``: the gates without gradient, or their inverse."""
        return 1 - gates.detach() if self.selection == "anti" else gates.detach()


def spot_label(spot: Spot) -> str:
    """Short name of a spot in logs: ``"f2"``, or ``"f2-f3"`` where student and teacher index differ."""
    return f"f{spot.student}" if spot.student == spot.teacher else f"f{spot.student}-f{spot.teacher}"


def routing_loss(
    routed_ce: Tensor, student_ce: Tensor, logits_gate: Tensor, gamma: float, processes: int = 1
) -> Tensor:
    """Loss of the policy and the adapters, a scalar.

    Args:
        routed_ce: cross-entropy of the routed logits.
        student_ce: cross-entropy of the student's own logits on the same samples, no gradient.
        logits_gate: last gate ``[B]``; where it sends fewer than half of the batch through the teacher, each missing
            sample costs 1.
        gamma: weight of a routed loss above the student's; one below weighs ``1 / gamma``.
        processes: how many share the batch. Each asks for half of its own part; this is a sum over the batch, whereas
            gradients are averaged over processes.
    """
    difference = (routed_ce - student_ce).detach()
    weight = torch.where(difference > 0, gamma, torch.where(difference < 0, 1 / gamma, 1.0))
    missing = F.relu(logits_gate.shape[0] / 2 - logits_gate.sum())
    return routed_ce * weight + missing * processes
