"""One training step of the published code, from weights, a batch and noise that it is given.

`fidelity.py` starts this script with the checkout as the working folder. It imports nothing of this project, whose
packages have the names of the checkout's. It changes at run time: the batch, the noise, CUDA where there is none, and
calls that PyTorch no longer accepts.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

Step = dict[str, dict[str, list[Tensor]]]  # see `outcome`


class OneBatch(list):
    """A loader of one batch."""

    def __init__(self, batch: list[Tensor], samples: int):
        super().__init__([batch])
        self.dataset = range(samples)


def prepare(job: dict[str, Any]) -> partial:
    """Let the code's own `main` build everything; its `train_epoch` with what `train_kd` would be called with."""
    with open(job["config"], encoding="utf-8") as file:
        config = yaml.safe_load(file)
    config["kd"]["teacher"]["checkpoint"] = os.path.join(job["files"], "teacher.pth")
    path = os.path.join(job["files"], "config.yml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
    image, label, index = torch.load(os.path.join(job["files"], "batch.pth"))
    batch = [image, label]
    if config["kd_loss"]["name"] == "CRD":
        negatives = torch.randint(job["samples"], (len(index), job["negatives"]))
        batch += [index, torch.cat([index[:, None], negatives], dim=1)]
    loader = OneBatch(batch, job["samples"])

    code = importlib.import_module("train")
    code.__global_values__ = {"it": 0}  # which its command line makes
    code.get_dataloader = lambda *_, **__: (loader, loader, job["num_classes"])
    code.get_cifar100_dataloaders_sample = lambda *_, **__: (loader, loader, job["samples"])
    code.init_pretrain = lambda *_, **__: None
    built = {}
    code.train_kd = lambda **everything: built.update(everything)
    with torch.no_grad():  # it adds to the bias of the policy in place
        code.main(cfg_filepath=path, file_name_cfg="benchmark", logdir=job["files"])
    names = ("cfg", "train_loader", "module_dict", "criterion_dict", "optimizer", "agent_optimizer", "tb_writer")
    chosen = {name: built[name] for name in (*names, "device", "layers")}
    return partial(code.train_epoch, epoch=1, **chosen)


def patch() -> None:
    """Let code for CUDA run on a CPU, and let `view` copy where PyTorch once could take a view."""
    view = torch.Tensor.view

    def view_or_copy(tensor: Tensor, *shape: Any) -> Tensor:
        try:
            return view(tensor, *shape)
        except RuntimeError:
            return tensor.reshape(*shape)

    torch.Tensor.view = view_or_copy
    if not torch.cuda.is_available():
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
        torch.cuda.FloatTensor, torch.cuda.LongTensor = torch.FloatTensor, torch.LongTensor


def use_float64() -> None:
    """Let what the code asks for by the name of float32 be float64."""
    torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.cuda.FloatTensor = torch.DoubleTensor


def take_step(step: partial, given: dict[str, Any]) -> Step:
    """The `outcome` of the step, by names of the code's modules.

    Args:
        step: made by `prepare`.
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
    sys.path[0] = str(Path.cwd())
    patch()
    files = Path(job["files"])
    torch.save(take_step(prepare(job), torch.load(files / "given.pth")), files / "taken.pth")
