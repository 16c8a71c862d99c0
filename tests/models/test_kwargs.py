"""Keyword arguments of a network: those without effect are refused, and no others."""

import pytest
import torch
from torch import nn

from models import MODELS, get_model
from utils.errors import UserError


class Net(nn.Module):
    def __init__(self, num_classes: int, depth: int = 1, drop: float = 0.0, act=nn.ReLU):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))
        self.drop, self.act = drop, act()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(self.act(self.body(x)).mean(dim=(2, 3)))


def careless(num_classes: int, depth: int = 1, **kwargs) -> Net:
    """Looks for `drop` and `act` in what it is given, and for nothing else."""
    return Net(num_classes, depth, kwargs.get("drop", 0.0), kwargs.get("act", nn.ReLU))


def strict(num_classes: int, **kwargs) -> Net:
    return Net(num_classes, **kwargs)


def moody(num_classes: int, **kwargs) -> Net:
    """No two of its networks are the same."""
    moody.calls += 1
    net = Net(num_classes)
    net.serial_number = moody.calls
    return net


moody.calls = 0


class Ignores(Net):
    def __init__(self, num_classes: int, **kwargs):
        super().__init__(num_classes)


def build(factory, **kwargs):
    return get_model(f"{__name__}.{factory.__name__}", 5, kwargs=kwargs)


@pytest.mark.parametrize(
    ("factory", "kwargs", "key"),
    [
        (Ignores, {"depth": 3}, "depth"),
        (careless, {"dept": 3}, "dept"),
        (careless, {"depth": 2, "drop": 0.5, "width": 3}, "width"),
        (careless, {"drop": 0.0}, "drop"),  # its own default, in a factory that would accept any misspelling
    ],
)
def test_a_keyword_without_effect_is_refused_in_one_line(factory, kwargs, key):
    with pytest.raises(UserError) as caught:
        build(factory, **kwargs)
    assert str(caught.value) == (
        f"model '{__name__}.{factory.__name__}': kwargs: '{key}' has no effect: unknown keywords are ignored, and the "
        "network is the same without this one; leave it out or check its spelling"
    )


@pytest.mark.parametrize(
    ("factory", "kwargs"),
    [
        (careless, {"depth": 1}),  # the default, but of a parameter that is there
        (careless, {"depth": 3}),
        (careless, {"drop": 0.5}),  # seen in an attribute alone
        (careless, {"act": nn.GELU}),
        (strict, {"depth": 3}),
        (strict, {"drop": 0.0}),  # the default, in a factory that refuses what it does not know
        (moody, {"anything": 1}),  # nobody can tell
    ],
)
def test_any_other_keyword_is_accepted(factory, kwargs):
    build(factory, **kwargs)


def test_of_a_registered_model_as_well(monkeypatch):
    monkeypatch.setattr(MODELS, "_entries", {name: MODELS.get(name) for name in MODELS} | {"ignores": Ignores})
    with pytest.raises(UserError, match=r"^model 'ignores': kwargs: 'depth' has no effect: [^\n]*$"):
        get_model("ignores", 5, kwargs={"depth": 3})


def test_trying_draws_nothing():
    torch.manual_seed(0)
    Net(5, drop=0.5)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    build(careless, drop=0.5)
    assert torch.equal(torch.get_rng_state(), expected)
