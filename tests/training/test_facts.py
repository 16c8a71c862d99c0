"""What a run writes down of its networks before it begins."""

import torch
from torch import nn
from toys import IMAGE_SIZE, toy_data, toy_task

from utils.training.facts import facts_of, flops, flops_without_computing

CPU = torch.device("cpu")


class RemembersATensor(nn.Module):
    """Keeps a tensor from one call for the next ones."""

    def __init__(self):
        super().__init__()
        self.conv, self.mask = nn.Conv2d(3, 2, 3), None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x)
        return self.conv(x * self.mask)


class LooksAtValues(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) if x.sum().item() < 1 else x


def test_the_networks_are_counted_without_being_touched():
    task = toy_task("at")
    before = {name: value.clone() for name, value in task.state_dict().items()}
    random, modes = torch.get_rng_state(), [module.training for module in task.modules()]
    facts = facts_of(task, toy_data(), CPU)
    assert facts["flops"] == flops(task.student.eval(), IMAGE_SIZE, CPU) > 0
    assert facts["parameters"] == sum(p.numel() for p in task.student.parameters())
    assert facts["teacher_flops"] == flops(task.teacher, IMAGE_SIZE, CPU)
    assert facts["weights"] == {"loss/f1": (1.0, 0), "loss/f2": (1.0, 0), "loss/kl": (1.0, 0)}
    task.student.train()
    assert modes == [module.training for module in task.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_network_that_remembers_a_tensor_is_not_given_an_empty_one():
    model = RemembersATensor()
    assert flops_without_computing(model, (8, 8)) == flops(RemembersATensor(), (8, 8), CPU)
    assert model.mask is None


def test_a_network_that_looks_at_values_has_no_figure():
    assert flops_without_computing(LooksAtValues(3, 2, 3), (8, 8)) is None
