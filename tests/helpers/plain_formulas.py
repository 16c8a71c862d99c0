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
from torch import Tensor

from datasets.batch import Batch
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation

ALPHA, TEMPERATURE, GATE_TEMPERATURE = 1.0, 4.0, 5.0
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
    "kd": 0.0,  # it has no spots
    "dkd": 0.0,
    "dist": 0.0,
}
DKD_TARGET, DKD_OTHERS = 1.0, 8.0
DIST_EPS = 1e-8
GAMMA = {"at": 2.0, "vid": 2.0, "rkd": 2.0}  # on CIFAR-100, and 1 for the others
CRD_TEMPERATURE, CRD_MOMENTUM, CRD_EPS = 0.07, 0.5, 1e-7
PKT_EPS = 1e-7
MOMENTUM, STUDENT_DECAY, AGENT_DECAY = 0.9, 5e-4, 1e-3
AGENT = ("policy.", "router.")


@dataclass
class Draws:
    """All that is random in a step.

    Attributes:
        gumbel: noise of the policy's gates, ``[B, K + 1, 2]``.
        coins: gates of the random selection, ``[B, K + 1]``.
        negatives: of CRD, ``[B, K]`` for each of its spots.
    """

    gumbel: Tensor | None = None
    coins: Tensor | None = None
    negatives: list[Tensor] = field(default_factory=list)


@dataclass
class Step:
    """What a step gives.

    Attributes:
        losses: every loss by name, ``"spot 0"`` being that of the first spot, without its weight.
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
        distiller, selection: by name.
        student: name of the network, on which the learning rate depends.
        spots: pairs of indices (student's, teacher's), if not those of the distiller.
    """

    def __init__(
        self,
        task: SpotAdaptiveDistillation,
        distiller: str,
        selection: str,
        student: str,
        spots: Sequence[tuple[int, int]] | None = None,
    ):
        # In the usual layout, whatever the one that is fast here.
        self.copy = copy.deepcopy(task).double().to(memory_format=torch.contiguous_format)
        self.distiller, self.selection, self.spots = distiller, selection, spots
        self.lr = 0.01 if student.startswith(("MobileNetV2", "Shuffle")) else 0.05
        self.velocity: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, draws: Draws) -> Step:
        student, teacher = self.copy.student.train(), self.copy.teacher.eval()
        features, logits = student.features(batch.image)
        with torch.no_grad():
            teacher_features, teacher_logits = teacher.features(batch.image)
        spots = self.spots or choose_spots(self.distiller, len(features), len(teacher_features))
        size = (len(batch.label), len(spots) + 1)

        gates = None
        if self.selection in ("adaptive", "anti"):
            gates = draw_gates(self.copy.policy.linear, teacher_features[-1], features[-1], draws.gumbel)
            chosen = (gates == 1) if self.selection == "adaptive" else (gates == 0)
        else:
            chosen = torch.ones(size, dtype=torch.bool) if self.selection == "fixed" else draws.coins == 1
        assert chosen.shape == size

        ce = cross_entropy(logits, batch.label)
        terms, reviewed = [], []
        if self.distiller == "reviewkd":
            reviewed = review(self.copy.distiller, features, teacher_features, spots)
        for k in range(len(spots)):
            rows = chosen[:, k]
            if self.distiller == "crd":
                term = crd(self.copy.distiller.contrasts[k], features[-1], teacher_features[-1], rows, batch, draws, k)
            elif self.distiller == "reviewkd":
                term = context(reviewed[k][rows], as_map(teacher_features[spots[k][1]])[rows])
            else:
                term = LOSSES[self.distiller](self.copy.distiller, k, features, teacher_features, spots[k], rows)
            terms.append(rows.sum() / len(rows) * term if rows.any() else torch.zeros(()))
        rows = chosen[:, -1]
        match self.distiller:
            case "dkd":
                matched = sum(map(decoupled, logits[rows], teacher_logits[rows], batch.label[rows])) / len(rows)
            case "dist":
                related = relations(logits[rows], teacher_logits[rows]) if rows.any() else torch.zeros(())
                matched = related * rows.sum() / len(rows)
            case _:
                matched = divergence(logits[rows], teacher_logits[rows]).sum() / len(rows)
        loss = ce + BETA[self.distiller] * sum(terms) + ALPHA * matched
        losses = {"logits" if self.distiller in ("dkd", "dist") else "kl": matched, "ce": ce, "total": loss}
        losses |= {f"spot {k}": term for k, term in enumerate(terms)}
        gradients = self._backward(loss)

        routed = None
        if gates is not None:
            routed = self._route(batch.image, spots, gates)
            routed_ce = cross_entropy(routed, batch.label)
            gamma = GAMMA.get(self.distiller, 1.0)
            weight = gamma if routed_ce > ce else 1 / gamma if routed_ce < ce else 1.0
            missing = len(batch.label) / 2 - gates[:, -1].sum()
            policy = routed_ce * weight + (missing if missing > 0 else 0.0)
            losses |= {"routed_ce": routed_ce, "policy": policy}
            # The student's are among these gradients: the published code computes them and throws them away.
            of_policy = self._backward(policy)
            gradients |= {name: gradient for name, gradient in of_policy.items() if name.startswith(AGENT)}
        return Step({name: value.detach() for name, value in losses.items()}, gradients, chosen, routed)

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


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of each sample's softened prediction from the teacher's, times the squared temperature."""
    p_t = torch.softmax(teacher / TEMPERATURE, dim=1)
    p_s = torch.softmax(student / TEMPERATURE, dim=1)
    return (p_t * (p_t.log() - p_s.log())).sum(dim=1) * TEMPERATURE**2


def decoupled(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """Decoupled divergence of one sample's prediction from the teacher's."""
    p_t, p_s = (torch.softmax(z / TEMPERATURE, dim=0) for z in (teacher, student))
    target = sum(a * (a / b).log() for a, b in ((p_t[label], p_s[label]), (1 - p_t[label], 1 - p_s[label])))
    others = [c for c in range(len(student)) if c != label]
    q_t, q_s = (torch.softmax(z[others] / TEMPERATURE, dim=0) for z in (teacher, student))
    return (DKD_TARGET * target + DKD_OTHERS * (q_t * (q_t / q_s).log()).sum()) * TEMPERATURE**2


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the correlations of samples over classes, and of classes over samples, means of each."""
    p_t, p_s = (torch.softmax(z / TEMPERATURE, dim=1) for z in (teacher, student))
    result = 0.0
    for a, b in ((p_s, p_t), (p_s.T, p_t.T)):
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        lengths = a.norm(dim=1) * b.norm(dim=1) + DIST_EPS
        result = result + (1 - (a * b).sum(dim=1) / lengths).mean()
    return result * TEMPERATURE**2


def of_one_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The larger of two maps averaged down to the smaller."""
    size = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:])]
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)


def energy(feature: Tensor) -> Tensor:
    """Mean square over channels as a unit vector, ``[n, HW]``."""
    flat = (feature**2).mean(dim=1).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True)


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, d**2 / 2, d - 0.5)


# Each of the following takes the distiller's modules, the number of the spot, all features of both networks, the pair
# of indices that the spot is, and which samples are chosen; it gives the mean loss of those samples.


def fitnet(own, k, student, teacher, spot, rows):
    regressed = own.regressors[k](student[spot[0]])
    return ((regressed[rows] - teacher[spot[1]][rows]) ** 2).mean()


def at(own, k, student, teacher, spot, rows):
    s, t = of_one_size(student[spot[0]][rows], teacher[spot[1]][rows])
    return ((energy(s) - energy(t)) ** 2).mean()


def sp(own, k, student, teacher, spot, rows):
    grams = []
    for feature in (student[spot[0]], teacher[spot[1]]):
        flat = feature[rows].flatten(1)
        gram = flat @ flat.T
        grams.append(gram / gram.norm(dim=1, keepdim=True))
    return ((grams[1] - grams[0]) ** 2).sum() / len(grams[0]) ** 2


def cc(own, k, student, teacher, spot, rows):
    e_s, e_t = own.student[k](student[spot[0]])[rows], own.teacher[k](teacher[spot[1]]).detach()[rows]
    delta = (e_s - e_t).abs()
    pairs = [(delta[i] * delta[i + 1]).sum() for i in range(len(delta) - 1)]
    return sum(pairs) / len(pairs) if pairs else torch.zeros(())


def vid(own, k, student, teacher, spot, rows):
    s, t = of_one_size(student[spot[0]][rows], teacher[spot[1]][rows])
    mean = own.means[k](s)
    variance = torch.log(1 + torch.exp(own.rhos[k])) + 1e-5
    variance = variance.view(1, -1, 1, 1).expand_as(t)
    return (((mean - t) ** 2 / variance + variance.log()) / 2).mean()


def rkd(own, k, student, teacher, spot, rows):
    n = int(rows.sum())
    if n < 2:
        return torch.zeros(())
    distances, angles = [], []
    for x in (student[spot[0]][rows], teacher[spot[1]][rows]):
        e = x[None, :, :] - x[:, None, :]  # e[i, j]: from sample i to sample j
        d = (e**2).sum(dim=2).clamp_min(1e-12).sqrt() * (1 - torch.eye(n))
        distances.append(d / d[d > 0].mean())
        direction = e / (e**2).sum(dim=2, keepdim=True).clamp_min(1e-24).sqrt()
        angles.append(torch.stack([direction[i] @ direction[i].T for i in range(n)]))
    return 25 * smooth_l1(*distances).sum() / n**2 + 50 * smooth_l1(*angles).sum() / n**3


def pkt(own, k, student, teacher, spot, rows):
    p = []
    for x in (student[spot[0]][rows], teacher[spot[1]][rows]):
        unit = x / (x.norm(dim=1, keepdim=True) + PKT_EPS)
        kernel = (unit @ unit.T + 1) / 2
        p.append(kernel / kernel.sum(dim=1, keepdim=True))
    p_s, p_t = p
    return (p_t * ((p_t + PKT_EPS) / (p_s + PKT_EPS)).log()).mean()


def ft(own, k, student, teacher, spot, rows):
    translated = own.translators[k](student[spot[0]])
    with torch.no_grad():
        factor = own.paraphrasers[k].encoder(teacher[spot[1]])
    s, t = of_one_size(translated[rows], factor[rows])
    return (energy(s) - energy(t)).abs().mean()


def fsp(own, k, student, teacher, spot, rows):
    flows = []
    for features, i in ((student, spot[0]), (teacher, spot[1])):
        bottom, top = of_one_size(features[i - 1][rows], features[i][rows])
        bottom, top = bottom.flatten(2), top.flatten(2)
        flows.append(bottom @ top.mT / bottom.shape[2])
    return ((flows[0] - flows[1]) ** 2).mean()


def nst(own, k, student, teacher, spot, rows):
    total = 0.0
    for s, t in zip(*of_one_size(student[spot[0]][rows], teacher[spot[1]][rows])):
        s, t = s.flatten(1), t.flatten(1)
        # A channel that is dead at every position stays zero.
        s, t = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (s, t))
        kernels = [((a @ b.T) ** 2).mean() for a, b in ((t, t), (s, s), (s, t))]
        total = total + kernels[0] + kernels[1] - 2 * kernels[2]
    return total / rows.sum()


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


def context(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared differences of maps and of their poolings."""
    if len(student) == 0:
        return torch.zeros(())
    total, weight, weights = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            pooled = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
            total, weights = total + weight * ((pooled[0] - pooled[1]) ** 2).mean(), weights + weight
    return total / weights


LOSSES: dict[str, Callable] = {loss.__name__: loss for loss in (fitnet, at, sp, cc, vid, rkd, pkt, ft, fsp, nst)}


def crd(contrast, student: Tensor, teacher: Tensor, rows: Tensor, batch: Batch, draws: Draws, k: int) -> Tensor:
    """Mean loss of the chosen samples in both directions; afterwards the banks move, one sample at a time."""
    embedded = contrast.embed_student(student), contrast.embed_teacher(teacher)
    unit_s, unit_t = (x / x.norm(dim=1, keepdim=True) for x in embedded)
    candidates = torch.cat([batch.index[:, None], draws.negatives[k]], dim=1)
    loss = torch.zeros(())
    if rows.any():
        for anchor, bank in ((unit_s, contrast.teacher_bank), (unit_t, contrast.student_bank)):
            samples, noise = len(bank.rows), draws.negatives[k].shape[1] / len(bank.rows)
            vectors = bank.rows[candidates[rows]]  # [n, K + 1, D]
            scores = ((anchor[rows][:, None, :] * vectors).sum(dim=2) / CRD_TEMPERATURE).exp()
            if bank.normalizer < 0:  # not set yet
                bank.normalizer.fill_(samples * scores.detach().mean())
            p = scores / bank.normalizer
            own = (p[:, 0] / (p[:, 0] + noise + CRD_EPS)).log()
            others = (noise / (p[:, 1:] + noise + CRD_EPS)).log().sum(dim=1)
            loss = loss - (own + others).mean()
    for i, sample in enumerate(batch.index):
        for bank, unit in ((contrast.student_bank, unit_s), (contrast.teacher_bank, unit_t)):
            if rows[i]:
                row = CRD_MOMENTUM * bank.rows[sample] + (1 - CRD_MOMENTUM) * unit[i].detach()
                bank.rows[sample] = row / math.sqrt((row**2).sum())
    return loss
