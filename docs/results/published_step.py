"""One training step of the published code, for fidelity.py: started with the checkout as its folder.

    python published_step.py CONFIG FOLDER THREADS

FOLDER has ``teacher.pth`` and ``given.pth``, what the step starts from, and gets ``taken.pth``, its `outcome`. Nothing
of this project is imported, whose packages have the names of the checkout's.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

SAMPLES, CLASSES = 50_000, 100  # CIFAR-100

Step = dict[str, dict[str, list[Tensor]]]  # see `outcome`


def outcome(values: dict[str, Tensor], tensors: dict[str, list[Tensor]]) -> Step:
    """The values, and the gradients and the state of the tensors of each module; no gradient is zero."""
    return {
        "values": {name: [value.detach()] for name, value in values.items()},
        "gradients": {n: [torch.zeros_like(x) if x.grad is None else x.grad for x in xs] for n, xs in tensors.items()},
        "state": {name: [x.detach() for x in xs] for name, xs in tensors.items()},
    }


class OneBatch(list):
    """A loader of one batch."""

    dataset = range(SAMPLES)


def patch_pytorch() -> None:
    """Let code for CUDA run on a CPU, and views be taken where PyTorch once took them."""
    view = torch.Tensor.view

    def view_or_copy(tensor: Tensor, *shape: Any) -> Tensor:
        try:
            return view(tensor, *shape)
        except RuntimeError:
            return tensor.reshape(*shape)

    torch.Tensor.view = view_or_copy
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda.FloatTensor, torch.cuda.LongTensor = torch.FloatTensor, torch.LongTensor


def use_float64() -> None:
    """Let what the code asks for by the name of float32 be float64."""
    torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.cuda.FloatTensor = torch.DoubleTensor


def prepare(config_file: str, folder: str, batch: list[Tensor]) -> partial:
    """Let the published code's `main` build everything; its `train_epoch` on the batch, ready to be called."""
    config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    config["kd"]["teacher"]["checkpoint"] = f"{folder}/teacher.pth"
    path = Path(folder, "config.yml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    loader = OneBatch([batch])
    code = importlib.import_module("train")
    code.__global_values__ = {"it": 0}  # which its command line makes
    code.get_dataloader = lambda *_, **__: (loader, loader, CLASSES)
    code.get_cifar100_dataloaders_sample = lambda *_, **__: (loader, loader, SAMPLES)
    code.init_pretrain = lambda *_, **__: None
    built: dict[str, Any] = {}
    code.train_kd = lambda **everything: built.update(everything)
    with torch.no_grad():  # it adds to the bias of the policy in place
        code.main(cfg_filepath=str(path), file_name_cfg="fidelity", logdir=folder)
    names = ("cfg", "module_dict", "criterion_dict", "optimizer", "agent_optimizer", "device", "layers")
    return partial(code.train_epoch, epoch=1, train_loader=loader, **{name: built[name] for name in names})


def take_published_step(step: partial, given: dict[str, Any]) -> Step:
    """The `outcome` of the step, by names of the code's modules.

    Args:
        step: see `prepare`.
        given: ``state``, the tensors of each module; ``uniform``, the noise of the gates.
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

    def log(main_tag: str, tag_scalar_dict: dict[str, float], **_: Any) -> None:
        parts[main_tag] = tag_scalar_dict

    step(tb_writer=SimpleNamespace(add_scalars=log))
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


def main() -> None:
    config_file, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sys.path[0] = str(Path.cwd())
    patch_pytorch()
    given = torch.load(f"{folder}/given.pth")
    torch.save(take_published_step(prepare(config_file, folder, given["batch"]), given), f"{folder}/taken.pth")


if __name__ == "__main__":
    main()
