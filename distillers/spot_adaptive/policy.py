"""The policy network and its gates: where to distil, for each sample and at each iteration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER_ROUTE = 0  # entry of each pair of policy logits that stands for "through the teacher", i.e. "distil here"
HOMOGENEOUS_BIAS = 10.0


class Policy(nn.Module):
    """One linear layer from both networks' pooled vectors to two logits per gate (Song et al., TIP 2022).

    Args:
        teacher_dim, student_dim: widths of the pooled vectors.
        num_gates: spots plus one, the last gate being that of the logits.
        homogeneous: teacher and student are of one family; the gates then start almost surely at "distil".
    """

    def __init__(self, teacher_dim: int, student_dim: int, num_gates: int, homogeneous: bool):
        super().__init__()
        self.num_gates = num_gates
        self.linear = nn.Linear(teacher_dim + student_dim, 2 * num_gates)
        if homogeneous:
            with torch.no_grad():
                self.linear.bias.view(num_gates, 2)[:, TEACHER_ROUTE] += HOMOGENEOUS_BIAS

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Pooled vectors ``[B, D_t]`` and ``[B, D_s]`` to policy logits ``[B, num_gates, 2]``.

        The inputs are detached: the policy must not move the networks that it looks at.
        """
        seen = torch.cat([teacher.detach(), student.detach()], dim=1)
        return self.linear(seen.to(self.linear.weight.dtype)).view(-1, self.num_gates, 2)

    def draw_gates(self, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        """Gates ``[B, num_gates]``, see `straight_through_gates`."""
        return straight_through_gates(self(teacher, student), temperature)


def straight_through_gates(logits: Tensor, temperature: float) -> Tensor:
    """Draw gates from policy logits by the straight-through Gumbel-softmax.

    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017.

    Args:
        logits: ``[B, num_gates, 2]``.
        temperature: of the softmax whose gradient stands in for that of the hard choice.

    Returns:
        ``[B, num_gates]``: exactly 1 (distil) or 0 forward, the soft choice's gradient backward.
    """
    # The exponential is exactly 0 once in a few million draws, and -log(0) would turn the softmax into NaN.
    noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(logits.dtype).tiny).log()
    soft = F.softmax((logits + noise) / temperature, dim=-1)[..., TEACHER_ROUTE]
    hard = (soft >= 0.5).to(soft.dtype)
    # This order adds an exact zero, so that the gate is a true 0 or 1; hard - soft.detach() + soft can be an ulp off.
    return hard + (soft - soft.detach())
