"""Parts of the loss that are differentiated before the rest is computed."""

import pytest
import torch
from torch import nn
from toys import toy_batch, toy_task

from distillers.spot_adaptive.early import differentiated, with_gradient


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_of(net):
    return net(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).square().mean()


def test_the_gradients_are_those_of_the_ordinary_backward_pass_also_when_scaled_and_added():
    plain, early = network(), network()
    (3 * loss_of(plain) + plain[0].weight.sum()).backward()
    total = 3 * differentiated(loss_of(early), list(early.parameters())) + early[0].weight.sum()
    total.backward()
    for one, other in zip(plain.parameters(), early.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=0)


def test_gradients_are_added_to_what_is_there_and_hooks_run_in_the_backward_pass():
    net = network()
    loss_of(net).backward()
    once = [parameter.grad.clone() for parameter in net.parameters()]
    ran = []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: ran.append(parameter))
    loss = differentiated(loss_of(net), list(net.parameters()))
    assert not ran
    loss.backward()
    assert len(ran) == len(once)
    for parameter, gradient in zip(net.parameters(), once):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-14, atol=0)


def test_the_activations_are_gone_before_the_backward_pass():
    net, freed = network(), []

    class Remembered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.clone())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            freed.append(ctx)
            return gradient

    loss = Remembered.apply(loss_of(net))
    differentiated(loss, list(net.parameters()))
    with pytest.raises(RuntimeError, match="freed"):
        _ = freed[0].saved_tensors


def test_what_the_loss_does_not_depend_on_gets_no_gradient():
    net, stranger = network(), nn.Parameter(torch.ones(2))
    differentiated(loss_of(net), [*net.parameters(), stranger]).backward()
    assert stranger.grad is None
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_without_gradients_the_loss_is_handed_back():
    net = network()
    with torch.no_grad():
        loss = loss_of(net)
        assert differentiated(loss, list(net.parameters())) is loss


def test_a_known_gradient_is_handed_to_tensors_inside_a_graph():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    inner = x * 3
    value = with_gradient(torch.tensor(7.0), [torch.tensor([10.0, 20.0])], [inner])
    assert value.item() == 7
    value.backward()
    assert x.grad.tolist() == [30, 60]


def test_the_students_activations_make_room_for_the_routed_pass(monkeypatch):
    task, batch = toy_task("at"), toy_batch()
    kept, at_routing = [], []

    def pack(tensor):
        kept.append(None)
        return Token(tensor, kept)

    class Token:
        """Stands for a tensor that a graph remembers."""

        def __init__(self, tensor, count):
            self.tensor, self.count = tensor, count

        def __del__(self):
            self.count.pop()

    route = task.router.forward
    monkeypatch.setattr(task.router, "forward", lambda *args: (at_routing.append(len(kept)), route(*args))[1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
        task(batch).loss.backward()
    # What is left is the policy's own: a handful, where the student alone remembers dozens.
    assert 0 < at_routing[0] <= 8
