"""One training step as the formulas of spot-adaptive distillation are written, slow and literal.

The losses, the routing and the optimisers share no code with the package; of a task they take the modules, as holders
of parameters. Chosen samples are gathered, the loss of those ``n`` is scaled by ``n / B``, the two losses have a
backward pass each, and nothing that was once computed is used twice. What a distiller owns (regressors, translators,
embeddings) sees the whole batch, because it may hold a BatchNorm; the chosen samples are picked from its output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from plain_losses import SPOT_LOSSES, crd, dist, dkd, kl, nkd, of_one_size, reviewkd, standardized, wttm
from torch import Tensor

from datasets.batch import Batch
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from utils.config import Config

ALPHA = {"wttm": 4.0}  # and 1 for the others
GATE_TEMPERATURE = 5.0
BETA = {
    "fitnet": 1.0,
    "at": 1000.0,
    "sp": 3000.0,
    "cc": 0.02,
    "vid": 1.0,
    "rkd": 1.0,
    "pkt": 30000.0,
    "ft": 200.0,
    "fsp": 50.0,
    "nst": 50.0,
    "crd": 0.8,
    "reviewkd": 1.0,
}
GAMMA = {"at": 2.0, "vid": 2.0, "rkd": 2.0}  # on CIFAR-100, and 1 for the others
CRD_TEMPERATURE, CRD_MOMENTUM = 0.07, 0.5
MOMENTUM, STUDENT_DECAY, AGENT_DECAY = 0.9, 5e-4, 1e-3
AGENT = ("policy.", "router.")


@dataclass
class Draws:
    """All that is random in a step.

    Attributes:
        gumbel: noise of the policy's gates, ``[B, K + 1, 2]``.
        coins: gates of the random selection, ``[B, K + 1]``.
        orders: of the shuffled selection: from which sample each gate is taken, ``[B, K + 1]``.
        negatives: of CRD, ``[B, K]`` for each of its spots.
    """

    gumbel: Tensor | None = None
    coins: Tensor | None = None
    orders: Tensor | None = None
    negatives: list[Tensor] = field(default_factory=list)


@dataclass
class Step:
    """What a step gives.

    Attributes:
        losses: by the names of `TaskOutput.parts`, and the sum of what is differentiated.
        gradients: by name of parameter; those that no loss reaches are left out.
        chosen: where the student was distilled, bool ``[B, K + 1]``.
        routed: routed logits, where there is a policy.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]
    chosen: Tensor
    routed: Tensor | None


class PlainStep:
    """Steps of one distiller under one selection, in float64, on a copy of all that `task` holds.

    Args:
        task: where the parameters, running statistics and memory banks come from.
        config: the names of the distiller, the selection and the student, the spots and what is matched at the logits
            if they are not those of the distiller, and ``kd.balance``; with a warm-up, of four epochs, this is the
            third.
    """

    def __init__(self, task: SpotAdaptiveDistillation, config: Config):
        # In the usual layout, whatever the one that is fast here.
        self.copy = copy.deepcopy(task).double().to(memory_format=torch.contiguous_format)
        kd, options = config.kd, config.kd_loss
        self.distiller, self.selection, self.spots = options.name, kd.selection, options.spots
        self.logits, self.standardize, self.cap = options.logits or options.name, options.standardize, kd.balance
        self.ramp = 3 / 4 if kd.warmup_epochs else 1.0
        self.alpha, self.beta = self.ramp * ALPHA.get(options.name, 1.0), self.ramp * BETA.get(options.name, 0.0)
        self.lr = 0.01 if kd.student.name.startswith(("MobileNetV2", "Shuffle")) else 0.05
        self.velocity: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, draws: Draws) -> Step:
        student, teacher = self.copy.student.train(), self.copy.teacher.eval()
        features, logits = student.features(batch.image)
        with torch.no_grad():
            teacher_features, teacher_logits = teacher.features(batch.image)
        spots = self.spots or choose_spots(self.distiller, len(features), len(teacher_features))
        size = (len(batch.label), len(spots) + 1)

        gates = None
        if self.selection in ("adaptive", "anti", "shuffled"):
            gates = draw_gates(self.copy.policy.linear, teacher_features[-1], features[-1], draws.gumbel)
        match self.selection:
            case "adaptive" | "anti":
                chosen = gates == (1 if self.selection == "adaptive" else 0)
            case "fixed":
                chosen = torch.ones(size, dtype=torch.bool)
            case "shuffled":
                chosen = torch.stack([gates[order, k] == 1 for k, order in enumerate(draws.orders.T)], dim=1)
            case "random":
                chosen = draws.coins == 1
        assert chosen.shape == size

        ce = cross_entropy(logits, batch.label)
        matched = self._logit_term(logits, teacher_logits, batch.label, chosen[:, -1])
        inputs = [x.detach().requires_grad_() for x in features] if self.cap else features
        terms = self._spot_terms(inputs, teacher_features, spots, chosen, batch, draws)
        spots_total = self.beta * sum(terms)
        loss = ce + spots_total + self.alpha * matched
        losses = {f"loss/{self.copy.logit_loss.label}": matched, "loss/ce": ce, "loss/total": loss}
        differentiated, weights = loss, []
        if self.cap:
            differentiated, weights = self._balance(ce + self.alpha * matched, spots_total, features, inputs)
        labels = self.copy.gate_labels
        for kind, values in (("loss", terms), ("gate", chosen.double().mean(dim=0))):
            losses |= {f"{kind}/{label}": value for label, value in zip(labels, values)}
        losses |= {f"weight/{label}": weights[s] for label, (s, _) in zip(labels, spots) if weights}
        gradients = self._backward(differentiated)

        routed, policy = None, 0.0
        if gates is not None:
            routed = self._route(batch.image, spots, gates)
            routed_ce = cross_entropy(routed, batch.label)
            gamma = GAMMA.get(self.distiller, 1.0)
            weight = gamma if routed_ce > ce else 1 / gamma if routed_ce < ce else 1.0
            missing = len(batch.label) / 2 - gates[:, -1].sum()
            policy = routed_ce * weight + (missing if missing > 0 else 0.0)
            losses |= {"loss/routed_ce": routed_ce, "loss/policy": policy}
            # The student's are among these gradients: the published code computes them and throws them away.
            of_policy = self._backward(policy)
            gradients |= {name: gradient for name, gradient in of_policy.items() if name.startswith(AGENT)}
        losses["differentiated"] = loss + policy
        return Step({name: value.detach() for name, value in losses.items()}, gradients, chosen, routed)

    def _spot_terms(self, features, teacher_features, spots, chosen, batch, draws) -> list[Tensor]:
        """Loss of every spot, times its chosen share."""
        own, terms = self.copy.distiller, []
        reviewed = review(own, features, teacher_features, spots) if self.distiller == "reviewkd" else []
        for k, spot in enumerate(spots):
            rows = chosen[:, k]
            if self.distiller == "crd":  # the banks move, even if no sample is chosen
                term = contrast(
                    own.contrasts[k], features[-1], teacher_features[-1], rows, batch.index, draws.negatives[k]
                )
            elif reviewed:
                term = loss_of(reviewkd, [reviewed[k][rows], as_map(teacher_features[spot[1]])[rows]])
            else:
                inputs = chosen_inputs(self.distiller, own, k, features, teacher_features, spot, rows)
                term = loss_of(SPOT_LOSSES[self.distiller], inputs)
            terms.append(rows.sum() / len(rows) * term)
        return terms

    def _logit_term(self, student: Tensor, teacher: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        if not rows.any():
            return torch.zeros(())
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        loss = {"dkd": dkd, "dist": dist, "nkd": nkd, "wttm": wttm}.get(self.logits, kl)
        labels = [label[rows]] if loss in (dkd, nkd) else []
        return loss(student[rows], teacher[rows], *labels) * rows.sum() / len(rows)

    def _balance(
        self, behind: Tensor, spots: Tensor, features: list[Tensor], inputs: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """What has the balanced gradients, and the weight at every feature, the deepest first.

        Args:
            behind: loss of all that is no spot.
            spots: β times the losses of the spots, which depend on the `inputs`, copies of the `features`.
        """
        weights = [torch.ones(()) for _ in features]
        if not spots.requires_grad:
            return behind + spots, weights
        pulls = torch.autograd.grad(spots, inputs, retain_graph=True, allow_unused=True)
        for k in reversed(range(len(features))):
            if pulls[k] is not None:
                (of_others,) = torch.autograd.grad(behind, features[k], retain_graph=True)
                if pulls[k].norm() > self.cap * of_others.norm():
                    weights[k] = self.cap * of_others.norm() / pulls[k].norm()
                behind = behind + (weights[k] * pulls[k] * features[k]).sum()
        return behind + spots, weights

    def optimise(self, gradients: dict[str, Tensor]) -> None:
        """SGD with momentum and weight decay."""
        with torch.no_grad():
            for name, parameter in self.copy.named_parameters():
                if name not in gradients:
                    continue
                of_agent = name.startswith(AGENT)
                lr, decay = (self.lr / 2, AGENT_DECAY) if of_agent else (self.lr, STUDENT_DECAY)
                direction = gradients[name] + decay * parameter
                self.velocity[name] = MOMENTUM * self.velocity.get(name, torch.zeros(())) + direction
                parameter -= lr * self.velocity[name]

    def _backward(self, loss: Tensor) -> dict[str, Tensor]:
        self.copy.zero_grad(set_to_none=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in self.copy.named_parameters() if p.grad is not None}

    def _route(self, image: Tensor, spots: Sequence[tuple[int, int]], gates: Tensor) -> Tensor:
        student, teacher, adapters = self.copy.student.eval(), self.copy.teacher.eval(), self.copy.router.train()
        ends_s = [s + 1 for s, _ in spots] + [None]
        ends_t = [t + 1 for _, t in spots] + [None]
        u_s, u_t = student.run(image, 0, ends_s[0]), teacher.run(image, 0, ends_t[0])
        for k in range(len(spots)):
            a = shaped(gates[:, k], u_s)
            to_t = (1 - a) * adapters.to_teacher[k](u_s) + a * u_t
            to_s = (1 - a) * u_s + a * adapters.to_student[k](u_t)
            u_s = student.run(to_s, ends_s[k], ends_s[k + 1])
            u_t = teacher.run(to_t, ends_t[k], ends_t[k + 1])
        a = shaped(gates[:, -1], u_s)
        return (1 - a) * u_s + a * u_t


def choose_spots(distiller: str, n_student: int, n_teacher: int) -> list[tuple[int, int]]:
    """Pairs of feature indices, of networks with so many features."""
    if distiller in ("at", "vid", "fsp", "nst"):
        middle_s, middle_t = range(1, n_student - 1), range(1, n_teacher - 1)
        return list(zip(middle_s, middle_t))
    if distiller in ("sp", "ft"):
        return [(n_student - 2, n_teacher - 2)]
    if distiller in ("cc", "rkd", "pkt", "crd"):
        return [(n_student - 1, n_teacher - 1)]
    if distiller == "reviewkd":
        return [*choose_spots("at", n_student, n_teacher), (n_student - 1, n_teacher - 1)]
    return [(2, 2)] if distiller == "fitnet" else []


def draw_gates(linear: torch.nn.Linear, teacher: Tensor, student: Tensor, gumbel: Tensor) -> Tensor:
    """``[B, K + 1]``: the hard choice forward, the gradient of the soft one backward."""
    logits = linear(torch.cat([teacher.detach(), student.detach()], dim=1))
    logits = logits.view(len(logits), -1, 2)
    soft = torch.softmax((logits + gumbel) / GATE_TEMPERATURE, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), 2)
    return (hard + (soft - soft.detach()))[..., 0]


def shaped(gate: Tensor, like: Tensor) -> Tensor:
    """``[B]`` to ``[B, 1, 1, 1]`` for maps, ``[B, 1]`` for vectors."""
    return gate.view([len(gate)] + [1] * (like.dim() - 1))


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=1)
    return -sum(log_p[i, label[i]] for i in range(len(label))) / len(label)


# ---- what the losses of the spots are given, from all features of both networks


def loss_of(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """0 where no sample is chosen. What the distiller owns has seen the batch all the same."""
    return loss(*inputs) if len(inputs[0]) else torch.zeros(())


def chosen_inputs(name: str, own, k: int, student, teacher, spot: tuple[int, int], rows: Tensor) -> list[Tensor]:
    """Arguments of the loss called `name` at spot number `k`, over the samples `rows`; `own` is the distiller."""
    s, t = student[spot[0]], teacher[spot[1]]
    match name:
        case "fitnet":
            return [own.regressors[k](s)[rows], t[rows]]
        case "cc":
            return [own.student[k](s)[rows], own.teacher[k](t).detach()[rows]]
        case "vid":
            s, t = of_one_size(s, t)
            return [own.means[k](s)[rows], own.rhos[k], t[rows]]
        case "ft":
            return [own.translators[k](s)[rows], own.paraphrasers[k].encoder(t).detach()[rows]]
        case "fsp":
            return [x[rows] for x in (student[spot[0] - 1], s, teacher[spot[1] - 1], t)]
    return [s[rows], t[rows]]


def as_map(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[:, :, None, None]


def review(own, student, teacher, spots) -> list[Tensor]:
    """The student's map at every spot, each fused with those of the deeper ones."""
    maps, above = [], None
    for fusion, (s, t) in reversed(list(zip(own.fusions, spots))):
        x, size = fusion.enter(as_map(student[s])), as_map(teacher[t]).shape[2:]
        if above is not None:
            above = F.interpolate(above, x.shape[2:])
            weight = torch.sigmoid(fusion.attention(torch.cat([x, above], dim=1)))
            x = x * weight[:, 0:1] + above * weight[:, 1:2]
        above = F.interpolate(x, size)
        maps.insert(0, fusion.leave(above))
    return maps


def contrast(own, student: Tensor, teacher: Tensor, rows: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
    """CRD's mean loss of the chosen samples in both directions; afterwards the banks move, one sample at a time."""
    embedded = own.embed_student(student), own.embed_teacher(teacher)
    unit_s, unit_t = (x / x.norm(dim=1, keepdim=True) for x in embedded)
    candidates = torch.cat([index[:, None], negatives], dim=1)
    loss = torch.zeros(())
    if rows.any():
        for anchor, bank in ((unit_s, own.teacher_bank), (unit_t, own.student_bank)):
            vectors, samples = bank.rows[candidates[rows]], len(bank.rows)  # [n, K + 1, D]
            scores = ((anchor[rows][:, None, :] * vectors).sum(dim=2) / CRD_TEMPERATURE).exp()
            if bank.normalizer < 0:  # not set yet
                bank.normalizer.fill_(samples * scores.detach().mean())
            loss = loss + crd(scores[:, 0], scores[:, 1:], bank.normalizer, samples)
    for i, sample in enumerate(index):
        for bank, unit in ((own.student_bank, unit_s), (own.teacher_bank, unit_t)):
            if rows[i]:
                row = CRD_MOMENTUM * bank.rows[sample] + (1 - CRD_MOMENTUM) * unit[i].detach()
                bank.rows[sample] = row / math.sqrt((row**2).sum())
    return loss
