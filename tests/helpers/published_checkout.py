"""A tiny folder with the interface of the published code: its entry, config and package names, and what PyTorch no
longer accepts of it. It trains two linear layers."""

from pathlib import Path

TRAIN = """
import logging, os
import torch, yaml
from torch import nn
from models import get_model
from distiller_zoo import Attention
from helper.util import accuracy, get_logger
from dataset.cifar import get_cifar100_dataloaders_sample
from helper.pretrain import init_pretrain


def get_dataloader(cfg):
    raise OSError("no data set is read")


def train_epoch(cfg, epoch, train_loader, module_dict, criterion_dict, optimizer, agent_optimizer, tb_writer, device,
                layers):
    for index, data in enumerate(train_loader):
        __global_values__["it"] += 1
        x, target = data[0].to(device), data[1].to(device)
        if cfg["kd_loss"]["name"] == "CRD":
            x, target, index, contrast = data
            assert contrast.shape == (len(x), 59 + 1) and torch.equal(contrast[:, 0], index)
        noise = torch.cuda.FloatTensor(target.shape).uniform_().cuda()
        logits = module_dict["student"](x.flatten(1)) + 0 * noise[:, None]
        loss = criterion_dict["kd"](logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy(logits, target)
        with open(os.environ["STEPS"], "a") as file:
            file.write(f"{cfg['kd_loss']['name']} {__global_values__['it']} {tuple(x.shape)}\\n")


def train_kd(**everything):
    raise RuntimeError("a whole run is not wanted")


def main(cfg_filepath, file_name_cfg, logdir, gpu_preserve=False, debug=False):
    with open(cfg_filepath) as file:
        cfg = yaml.load(file, Loader=yaml.SafeLoader)
    print("what it prints is no answer")
    get_logger(logging.INFO, os.path.join(logdir, "log"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = get_cifar100_dataloaders_sample if cfg["kd_loss"]["name"] == "CRD" else get_dataloader
    train_loader, val_loader, count = loader(cfg)
    assert torch.load(cfg["kd"]["teacher"]["checkpoint"])["model"]["fc.weight"].shape[0] == 100
    x, target = train_loader[0][:2]
    student = get_model(x[0].numel())
    student.bias[0] += 10
    init_pretrain(cfg)
    modules, agent = nn.ModuleDict({"student": student}), torch.optim.SGD(student.parameters(), lr=0.1)
    train_kd(cfg=cfg, train_loader=train_loader, val_loader=val_loader, module_dict=modules,
             criterion_dict=nn.ModuleDict({"kd": Attention()}), optimizer=agent, lr_scheduler=None,
             agent_optimizer=agent, agent_lr_scheduler=None, tb_writer=None, device=device, ckpt_dir=logdir, layers=[])
"""

FILES = {
    "train.py": TRAIN,
    "models/__init__.py": "from torch import nn\ndef get_model(width):\n    return nn.Linear(width, 100)\n",
    "distiller_zoo/__init__.py": "from torch import nn\nclass Attention(nn.CrossEntropyLoss):\n    pass\n",
    "dataset/cifar.py": "def get_cifar100_dataloaders_sample(**options):\n    raise OSError('no data set is read')\n",
    "helper/pretrain.py": "def init_pretrain(*arguments):\n    raise OSError('no epoch is trained')\n",
    "helper/util.py": """
import logging
def get_logger(level, logger_fp):
    logging.basicConfig(level=level)
def accuracy(output, target):
    correct = output.topk(5, 1)[1].t().eq(target.view(1, -1))
    return correct[:5].view(-1).float().sum()
""",
}
NAMES = {"at": "AT", "crd": "CRD"}  # of the folders and inside the configs


def write_checkout(folder: Path, pair: str) -> Path:
    """Write all of it to `folder`, with a config of `pair` for AT and CRD."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, own in NAMES.items():
        config = folder / "configs" / "cifar-100" / "seed-1029" / name / f"{pair}.yml"
        config.parent.mkdir(parents=True)
        config.write_text(f"{{kd: {{teacher: {{name: x, checkpoint: elsewhere}}}}, kd_loss: {{name: {own}}}}}")
    return folder
