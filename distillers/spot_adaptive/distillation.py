"""Spot-adaptive knowledge distillation: any distiller, under a policy that says where to distil.

Song, Chen, Ye, Song, "Spot-adaptive Knowledge Distillation", IEEE TIP 2022, arXiv 2205.02399.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Shape, Spot, scalar
from distillers.label_loss import LabelLoss, Targets
from distillers.logits import LOGIT_LOSSES, LogitLoss, standardized
from distillers.spot_adaptive.balance import Balance
from distillers.spot_adaptive.frozen import follow_numbers, frozen_twin
from distillers.spot_adaptive.policy import Policy, Seen, exact_gates
from distillers.spot_adaptive.routing import Router
from distillers.spot_adaptive.selection import SELECTIONS
from distillers.task import Task, TaskOutput
from models.staged import StagedModel
from utils.errors import UserError
from utils.processes.group import world_size


class SpotAdaptiveDistillation(Task):
    """The student's loss at the chosen spots, and the routing loss that teaches the policy to choose.

    The two losses have disjoint parameters and no gradient crosses between them. They are yielded one after the other,
    see `Task`: the routed pass begins when the student's activations are gone.

    Args:
        student, teacher: the networks; the teacher is frozen and stays in evaluation mode.
        distiller: what to distil.
        student_shapes, teacher_shapes: shape of every feature, batch dimension left out.
        selection: a name of `SELECTIONS`, which says where the student distils.
        policy: draws the gates; None where the selection has no policy.
        alpha, beta: weights of the loss at the logits and of the distiller's losses.
        gamma: factor of a routed cross-entropy above the student's; one below is divided by it.
        balance: how hard each spot may pull at the student in comparison with all that lies behind it, see `Balance`;
            None: there is no limit.
        logit_loss: what to match at the logits; None for the distiller's own, at temperature 4.
        standardize: bring each sample's logits to mean 0 and standard deviation 1 before they are matched.
        warmup_epochs: over how many epochs alpha and beta grow to their full values, by ``(epoch + 1) / epochs``; None:
            the loss at the logits says it for alpha, and the distiller for beta.
        routing_share: part of the batch that is routed, the first ``ceil(share * B)`` samples but at least two, at this
            share of the cost. They are a random sample, so the gradient of the routed cross-entropy is the same on
            average. Gamma and the adapters' BatchNorm look at fewer samples.
        label_loss: cross-entropy of the student and of the routed network; by default without smoothing, mixing and
            class weights. If it mixes images, all networks see the mixed ones. The distiller and the loss at the logits
            are given the label of the image itself.
    """

    def __init__(
        self,
        student: StagedModel,
        teacher: StagedModel,
        distiller: Distiller,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        selection: str = "adaptive",
        policy: Policy | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        balance: float | None = None,
        logit_loss: LogitLoss | None = None,
        standardize: bool = False,
        warmup_epochs: int | None = None,
        routing_share: float = 1.0,
        label_loss: LabelLoss | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.distiller = distiller
        self.label_loss = label_loss or LabelLoss()
        self.selection = selection
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.logit_loss: LogitLoss = logit_loss or LOGIT_LOSSES.get(distiller.logit_loss)()
        self.standardize = standardize
        self.alpha_epochs = self.logit_loss.warmup_epochs if warmup_epochs is None else warmup_epochs
        self.beta_epochs = distiller.warmup_epochs if warmup_epochs is None else warmup_epochs
        # Parts of alpha and beta, which follow from the epoch. They are written in place, where a CUDA graph reads.
        self.register_buffer("alpha_part", torch.ones(()), persistent=False)
        self.register_buffer("beta_part", torch.ones(()), persistent=False)
        self.balance = Balance(balance, len(student_shapes)) if balance and distiller.spots else None
        self.routing_share = routing_share
        self.num_gates = len(distiller.spots) + 1
        self.gate_labels = [spot_label(spot) for spot in distiller.spots] + ["logits"]
        self.policy = policy
        own = (("distiller", distiller), ("policy", policy), ("loss at the logits", self.logit_loss))
        self._own = [(kind, part, len(list(part.parameters()))) for kind, part in own if part is not None]
        self._gates_checked = policy is None or policy.binary
        self.routed = policy is not None and policy.routed
        self.register_buffer("epoch", torch.zeros(()), persistent=False)
        if self.routed:
            self.router = Router(distiller.spots, student_shapes, teacher_shapes)
        self._make_twin()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        of_logits = self.logit_loss.parameters()
        groups = {"student": [*self.student.parameters(), *self.distiller.main_parameters(), *of_logits]}
        if self.routed:
            groups["agent"] = [*self.policy.parameters(), *self.router.parameters()]
        return groups

    def start_epoch(self, epoch: int) -> None:
        for part, epochs in ((self.alpha_part, self.alpha_epochs), (self.beta_part, self.beta_epochs)):
            part.fill_(min(1.0, (epoch + 1) / max(1, epochs)))
        self.epoch.fill_(epoch)
        if self.routed:
            follow_numbers(self._twin[0], self.student)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._make_twin()  # moving the student gave it new tensors
        return self

    def _make_twin(self) -> None:
        if self.routed:
            # In a tuple, so that it is no submodule: it would double the student in state_dict and parameters.
            self._twin = (frozen_twin(self.student),)

    def forward(self, batch: Batch) -> Iterator[TaskOutput]:
        """The student's loss, then the policy's; ``parts`` has every term, and the share of samples distilled at each
        spot."""
        self.set_modes()
        batch, targets = self.label_loss.mix(Batch(*batch))  # loaders of users may give lists
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher.features(batch.image)
        output, gates = self._distil(batch, targets, teacher_features, teacher_logits)
        if not self.routed:
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
        if self.balance is None:
            features, logits = self.student.features(batch.image)
            for_distiller = features
        else:
            features, for_distiller, logits = self.balance.features(self.student, batch.image)
        if self.policy is None:
            gates = torch.ones(len(batch.label), self.num_gates, device=batch.label.device)
        else:
            gates = self.draw_gates(self.policy_input(features, teacher_features, logits, teacher_logits, batch.label))
        chosen = self.choose(gates)
        ce = self.label_loss(logits, targets)
        shared = (*features, *teacher_features, logits, teacher_logits, chosen, *batch)
        with unchanged(shared, f"distiller {type(self.distiller).__name__}"):
            spots = self.distiller(for_distiller, teacher_features, chosen[:, :-1], batch)
        with unchanged(shared, f"loss at the logits {type(self.logit_loss).__name__}"):
            at_logits = self._at_logits(logits, teacher_logits, chosen[:, -1], batch)
        self._refuse_new_parameters()
        of_spots, of_logits = self.beta * spots.sum(), self.alpha * at_logits
        # Without a warm-up no kernel is launched.
        of_spots = self.beta_part * of_spots if self.beta_epochs else of_spots
        of_logits = self.alpha_part * of_logits if self.alpha_epochs else of_logits
        loss = ce + of_spots + of_logits
        parts = {"loss/total": loss, "loss/ce": ce, f"loss/{self.logit_loss.label}": at_logits}
        parts |= self._by_spot("loss", spots) | self._by_spot("gate", chosen.mean(dim=0))
        if self.balance is not None:  # the backward pass will write into these tensors
            at = [spot.student for spot in self.distiller.spots]
            for kind, values in (("weight", self.balance.weight), ("ratio", self.balance.ratio)):
                parts |= self._by_spot(kind, [values[index] for index in at])
        parts = {name: part.detach() for name, part in parts.items()}
        return TaskOutput(loss, parts, logits.detach(), chosen, targets.dominant), gates

    def _at_logits(self, logits: Tensor, teacher_logits: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        if self.standardize:
            logits, teacher_logits = standardized(logits), standardized(teacher_logits)
        loss = self.logit_loss(logits, teacher_logits, gate, batch)
        return scalar(loss, f"loss at the logits {type(self.logit_loss).__name__}: forward")

    def _refuse_new_parameters(self) -> None:
        for kind, part, count in self._own:
            if len(list(part.parameters())) != count:
                raise UserError(
                    f"{kind} {type(part).__name__}: has made parameters in a step, which no optimiser trains; make "
                    "them in the constructor"
                )

    def _by_spot(self, kind: str, values: Iterable[Tensor]) -> dict[str, Tensor]:
        return {f"{kind}/{label}": value for label, value in zip(self.gate_labels, values)}

    def _route(self, batch: Batch, targets: Targets, start: Tensor, gates: Tensor, student: TaskOutput) -> TaskOutput:
        """The policy's loss, from the routed pass of the samples that `routing_share` leaves."""
        if not gates.requires_grad:
            raise UserError(
                f"policy {type(self.policy).__name__}: has parameters, and draw_gates gives gates without gradient, so "
                "they would learn nothing"
            )
        size = len(batch.label)
        count = min(size, max(2, math.ceil(self.routing_share * size - 1e-9)))  # 0.1 * 30 is 3, not 3.0000000000000004
        targets = targets.first(count)
        routed = self.router(batch.image[:count], self._twin[0], self.teacher, start[:count], gates[:count])
        routed_ce = self.label_loss(routed, targets)
        student_ce = student.parts["loss/ce"]
        if count < size:
            student_ce = self.label_loss(student.logits[:count], targets)
        loss = routing_loss(routed_ce, student_ce, gates[:, -1], self.gamma, world_size())
        return TaskOutput(loss, {"loss/routed_ce": routed_ce.detach(), "loss/policy": loss.detach()})

    def policy_input(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        student_logits: Tensor,
        teacher_logits: Tensor,
        label: Tensor,
    ) -> Seen:
        """What the policy may look at, from the features and logits of both networks."""
        features = [[to_look_at(feature) for feature in features] for features in (student, teacher)]
        return Seen(*features, to_look_at(student_logits), to_look_at(teacher_logits), label, self.epoch)

    def draw_gates(self, seen: Seen) -> Tensor:
        """Gates ``[B, K + 1]`` of the policy, with its gradient."""
        who = f"policy {type(self.policy).__name__}: draw_gates"
        shared = (*seen.student, *seen.teacher, seen.student_logits, seen.teacher_logits, seen.label, seen.epoch)
        with torch.autocast(seen.label.device.type, enabled=False), unchanged(shared, who):
            gates = self.policy.draw_gates(seen)
        self._check_shape(gates, seen, who)
        gates = gates.to(seen.student_logits.dtype)
        if self.policy.binary:
            return gates
        exact = exact_gates(gates)
        if not self._gates_checked:  # once, since looking at values waits for the device; later ones, the meter finds
            self._gates_checked = True
            if len(wrong := gates[exact.isnan()]):
                raise UserError(f"{who} gives {wrong[0]:g}, must be 0 or 1 each")
        return exact

    def chances(self, seen: Seen) -> Tensor:
        """What the policy says of its gates, see `Policy.chances`, ``[B, K + 1]``."""
        chances = self.policy.chances(seen)
        self._check_shape(chances, seen, f"policy {type(self.policy).__name__}: chances")
        return chances

    def _check_shape(self, gates: object, seen: Seen, who: str) -> None:
        size = (len(seen.label), self.num_gates)
        if not isinstance(gates, Tensor) or gates.shape != size:
            found = tuple(gates.shape) if isinstance(gates, Tensor) else f"a {type(gates).__name__}"
            raise UserError(f"{who} gives {found}, must be [B, K + 1], here {size}")

    def choose(self, gates: Tensor) -> Tensor:
        """Where the student distils, ``[B, K + 1]``, without gradient, from the policy's gates."""
        return SELECTIONS[self.selection].choose(gates.detach())


def to_look_at(tensor: Tensor) -> Tensor:
    """Without gradient; vectors in float32 at least, since autocast is off where a policy multiplies them."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.ndim == 2 else tensor


@contextmanager
def unchanged(tensors: Sequence[Tensor], who: str) -> Iterator[None]:
    """Raise a UserError if `who`, which only looks at `tensors`, writes into one of them."""
    before = [tensor._version for tensor in tensors]
    yield
    if before != [tensor._version for tensor in tensors]:
        raise UserError(f"{who} writes into a tensor that it is given, which others use too; clone it before")


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
