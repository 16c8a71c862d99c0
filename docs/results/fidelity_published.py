"""One training step of the published code, from weights, a batch and noise that it is given.

`fidelity.py` starts this script with the checkout as the working folder. It imports nothing of this project but, by
its path, `utils/benchmark/published_child.py`, which makes the checkout run under this PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Step = dict[str, dict[str, list[Tensor]]]  # see `outcome`


def load_module(path: str) -> ModuleType:
    """The module in the file `path`."""
    spec = importlib.util.spec_from_file_location("published_child", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use_float64() -> None:
    """Let what the code asks for by the name of float32 be float64."""
    torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.cuda.FloatTensor = torch.DoubleTensor


def take_step(step: partial, given: dict[str, Any]) -> Step:
    """The `outcome` of the step, by names of the code's modules.

    Args:
        step: what `published_child.prepare` has built.
        given: ``state``, the tensors of each module; ``uniform``, the noise of the gates; ``batch``.
    """
    root = nn.ModuleDict({"module": step.keywords["module_dict"], "criterion": step.keywords["criterion_dict"]})
    if given["uniform"].dtype == torch.float64:
        use_float64()
        root.double()
    tensors = {name: list(root.get_submodule(name).state_dict(keep_vars=True).values()) for name in given["state"]}
    for name, values in given["state"].items():
        for own, value in zip(tensors[name], values, strict=True):
            assert own.shape == value.shape, name
            own.data.copy_(value)
    torch.Tensor.uniform_ = lambda self, *_, **__: self.copy_(given["uniform"])  # what it draws the gates from

    teacher_logits: list[Tensor] = []  # of the plain pass, then of the routed one
    crossed: list[tuple[Tensor, Tensor]] = []  # logits and cross-entropy: of the routed network, then of the student
    losses: list[Tensor] = []  # the policy's, then the student's
    parts: dict[str, dict[str, float]] = {}  # what it logs
    teacher, cross_entropy = root["module"]["teacher"], root["criterion"]["cls"]
    teacher.register_forward_hook(lambda module, inputs, output: teacher_logits.append(output[1]))
    # Clones, since the code scales this loss in place.
    cross_entropy.register_forward_hook(lambda module, inputs, output: crossed.append((inputs[0], output.clone())))
    backward = torch.Tensor.backward

    def record_and_differentiate(loss: Tensor, **options: Any) -> None:
        losses.append(loss)
        backward(loss, **options)

    torch.Tensor.backward = record_and_differentiate
    writer = SimpleNamespace(
        add_scalars=lambda main_tag, tag_scalar_dict, **_: parts.update({main_tag: tag_scalar_dict})
    )
    step(train_loader=[given["batch"]], tb_writer=writer)
    (routed_logits, routed_ce), (logits, ce) = crossed
    values = {
        "teacher's logits": teacher_logits[0],
        "logits": logits,
        "cross-entropy": ce,
        "distiller's loss": torch.tensor(parts["train/loss"]["kd"], dtype=torch.float64),
        "loss at the logits": torch.tensor(parts["train/loss"]["div"], dtype=torch.float64),
        "student's loss": losses[1],
        "routed logits": routed_logits,
        "routed cross-entropy": routed_ce,
        "policy's loss": losses[0],
    }
    return outcome(values, tensors)


def outcome(values: dict[str, Tensor], tensors: dict[str, list[Tensor]]) -> Step:
    """The values, and the gradients and the state of the tensors of each module; no gradient is zero."""
    return {
        "values": {name: [value.detach()] for name, value in values.items()},
        "gradients": {n: [torch.zeros_like(x) if x.grad is None else x.grad for x in xs] for n, xs in tensors.items()},
        "state": {name: [x.detach() for x in xs] for name, xs in tensors.items()},
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    published_child = load_module(job["published_child"])
    sys.path[0] = str(Path.cwd())
    published_child.patch()
    files = Path(job["files"])
    prepared = published_child.prepare(job)
    torch.save(take_step(prepared, torch.load(files / "given.pth")), files / "taken.pth")
