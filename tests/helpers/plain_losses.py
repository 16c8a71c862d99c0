"""Every loss as its formula is written, slow and literal, over the chosen samples; it shares no code with ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 4.0
DKD_TARGET, DKD_OTHERS = 1.0, 8.0
DIST_EPS = 1e-8
CRD_EPS = 1e-7
PKT_EPS = 1e-7


# ---- losses of the logits, over the chosen samples: [n, num_classes]


def kl(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    p_t, p_s = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))
    return (p_t * (p_t.log() - p_s.log())).sum(dim=1).mean() * temperature**2


def dkd(student, teacher, label, temperature=TEMPERATURE, target=DKD_TARGET, nontarget=DKD_OTHERS) -> Tensor:
    total = 0.0
    for s, t, y in zip(student, teacher, label):
        p_t, p_s = (torch.softmax(z / temperature, dim=0) for z in (t, s))
        of_target = sum(a * (a / b).log() for a, b in ((p_t[y], p_s[y]), (1 - p_t[y], 1 - p_s[y])))
        q_t, q_s = (others(z / temperature, y) for z in (t, s))
        total = total + target * of_target + nontarget * (q_t * (q_t / q_s).log()).sum()
    return total / len(student) * temperature**2


def dist(student, teacher, temperature=TEMPERATURE, inter=1.0, intra=1.0) -> Tensor:
    """One minus the correlations of samples over classes, and of classes over samples, means of each."""
    p_t, p_s = (torch.softmax(z / temperature, dim=1) for z in (teacher, student))
    result = 0.0
    for weight, a, b in ((inter, p_s, p_t), (intra, p_s.T, p_t.T)):
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        lengths = a.norm(dim=1) * b.norm(dim=1) + DIST_EPS
        result = result + weight * (1 - (a * b).sum(dim=1) / lengths).mean()
    return result * temperature**2


def nkd(student, teacher, label, gamma=1.5, tau=1.0) -> Tensor:
    total = 0.0
    for s, t, y in zip(student, teacher, label):
        p_s, p_t = torch.softmax(s, dim=0), torch.softmax(t, dim=0)
        q_s, q_t = others(s / tau, y), others(t / tau, y)
        total = total - p_t[y] * p_s[y].log() - gamma * tau**2 * (q_t * q_s.log()).sum()
    return total / len(student)


def wttm(student, teacher, power=0.2) -> Tensor:
    total = 0.0
    for s, t in zip(student, teacher):
        powers = torch.softmax(t, dim=0) ** power
        q = powers / powers.sum()
        total = total + powers.sum() * (q * (q / torch.softmax(s, dim=0)).log()).sum()
    return total / len(student)


def others(logits: Tensor, label: Tensor) -> Tensor:
    """Softmax over the classes other than `label`, of one sample."""
    return torch.softmax(torch.stack([z for c, z in enumerate(logits) if c != label]), dim=0)


def standardized(logits: Tensor) -> Tensor:
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / ((centered**2).sum(dim=1, keepdim=True).div(logits.shape[1] - 1).sqrt() + 1e-7)


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


# ---- losses of the spots, over the chosen samples


def fitnet(regressed: Tensor, teacher: Tensor) -> Tensor:
    return ((regressed - teacher) ** 2).mean()


def at(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = of_one_size(student, teacher)
    return ((energy(s) - energy(t)) ** 2).mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    grams = []
    for feature in (student, teacher):
        flat = feature.flatten(1)
        gram = flat @ flat.T
        grams.append(gram / gram.norm(dim=1, keepdim=True))
    return ((grams[1] - grams[0]) ** 2).sum() / len(student) ** 2


def cc(student: Tensor, teacher: Tensor) -> Tensor:
    delta = (student - teacher).abs()
    pairs = [(delta[i] * delta[i + 1]).sum() for i in range(len(delta) - 1)]
    return sum(pairs) / len(pairs) if pairs else 0 * delta.sum()


def vid(mean: Tensor, rho: Tensor, teacher: Tensor) -> Tensor:
    variance = torch.log(1 + torch.exp(rho)) + 1e-5
    variance = variance.view(1, -1, 1, 1).expand_as(teacher)
    return (((mean - teacher) ** 2 / variance + variance.log()) / 2).mean()


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    if n < 2:
        return 0 * (student.sum() + teacher.sum())
    distances, angles = [], []
    for x in (student.flatten(1), teacher.flatten(1)):
        e = x[None, :, :] - x[:, None, :]  # e[i, j]: from sample i to sample j
        d = (e**2).sum(dim=2).clamp_min(1e-12).sqrt() * (1 - torch.eye(n))
        distances.append(d / d[d > 0].mean())
        direction = e / (e**2).sum(dim=2, keepdim=True).clamp_min(1e-24).sqrt()
        angles.append(torch.stack([direction[i] @ direction[i].T for i in range(n)]))
    return 25 * smooth_l1(*distances).sum() / n**2 + 50 * smooth_l1(*angles).sum() / n**3


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    p = []
    for x in (student.flatten(1), teacher.flatten(1)):
        unit = x / (x.norm(dim=1, keepdim=True) + PKT_EPS)
        kernel = (unit @ unit.T + 1) / 2
        p.append(kernel / kernel.sum(dim=1, keepdim=True))
    p_s, p_t = p
    return (p_t * ((p_t + PKT_EPS) / (p_s + PKT_EPS)).log()).mean()


def ft(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = of_one_size(student, teacher)
    return (energy(s) - energy(t)).abs().mean()


def fsp(student_bottom: Tensor, student_top: Tensor, teacher_bottom: Tensor, teacher_top: Tensor) -> Tensor:
    flows = []
    for bottom, top in ((student_bottom, student_top), (teacher_bottom, teacher_top)):
        bottom, top = (x.flatten(2) for x in of_one_size(bottom, top))
        flows.append(bottom @ top.mT / bottom.shape[2])
    return ((flows[0] - flows[1]) ** 2).mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    total = 0.0
    for s, t in zip(*of_one_size(student, teacher)):
        # A channel that is dead at every position stays zero.
        s, t = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (s, t))
        kernels = [((a @ b.T) ** 2).mean() for a, b in ((t, t), (s, s), (s, t))]
        total = total + kernels[0] + kernels[1] - 2 * kernels[2]
    return total / len(student)


def reviewkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared differences of maps and of their poolings."""
    total, weight, weights = ((student - teacher) ** 2).mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            weight /= 2
            pooled = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
            total, weights = total + weight * ((pooled[0] - pooled[1]) ** 2).mean(), weights + weight
    return total / weights


def crd(positive: Tensor, negative: Tensor, normalizer: Tensor, samples: int) -> Tensor:
    """In one direction, from the exponentials of the similarities."""
    noise = negative.shape[1] / samples
    p = positive / normalizer
    own = (p / (p + noise + CRD_EPS)).log()
    rejected = (noise / (negative / normalizer + noise + CRD_EPS)).log().sum(dim=1)
    return -(own + rejected).mean()


SPOT_LOSSES: dict[str, Callable] = {
    loss.__name__: loss for loss in (fitnet, at, sp, cc, vid, rkd, pkt, ft, fsp, nst, reviewkd)
}
