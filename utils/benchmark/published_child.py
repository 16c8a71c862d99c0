"""Takes a training step of the published code for every line that it reads, and answers with a line.

`utils.benchmark.published` starts this script with the checkout as the working folder. It imports nothing of this
project, whose packages have names of the checkout's.

The code's own `main` builds everything; its `train_epoch` takes the steps, on a loader of a single batch. What is
changed at run time: the batch, CUDA where there is none, and what PyTorch no longer accepts.
"""

import contextlib
import functools
import importlib
import json
import os
import sys

import torch
import yaml


class OneBatch(list):
    """A loader of one batch."""

    def __init__(self, batch, samples):
        super().__init__([batch])
        self.dataset = range(samples)


def prepare(job):
    """Let the published code build everything; what its `train_kd` is then called with."""
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
    return functools.partial(code.train_epoch, epoch=1, **chosen)


def patch():
    """Let code for CUDA run on a CPU, and views be taken where PyTorch once took them."""
    view = torch.Tensor.view

    def view_or_copy(tensor, *shape):
        try:
            return view(tensor, *shape)
        except RuntimeError:
            return tensor.reshape(*shape)

    torch.Tensor.view = view_or_copy
    if not torch.cuda.is_available():
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
        torch.cuda.FloatTensor, torch.cuda.LongTensor = torch.FloatTensor, torch.LongTensor


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    sys.path[0] = os.getcwd()
    with contextlib.redirect_stdout(sys.stderr):
        patch()
        step = prepare(job)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        print("done", flush=True)


if __name__ == "__main__":
    main()
