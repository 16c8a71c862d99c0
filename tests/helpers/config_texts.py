"""Small configs, and what reading them gives. The files are written to the current folder."""

from pathlib import Path

from utils.config import Config, load_config

SINGLE = "dataset: {name: digits}\nmodel: {name: vgg8}\n"
PAIR = """\
dataset: {name: digits}
kd:
  teacher: {name: vgg13}
  student: {name: vgg8}
kd_loss: {name: at}
"""

# In the format of the published files, everything spelt out.
PUBLISHED = """\
dataset:
  name: CIFAR100
  root: ./datasets/
  img_h: 32
  img_w: 32
  num_classes: 100
training:
  optimizer:
    name: SGD
    lr: 0.05
    weight_decay: 5e-4
    weight_decay_stage2: 5e-4
    momentum: 0.9
    weight_decay_agent: 1e-3
  lr: 0.05
  lr_agent: 0.025
  lr_agent_decay_epochs: [150, 180, 210]
  lr_decay_epochs: [150, 180, 210]
  lr_decay_rate: 0.1
  batch_size: 64
  num_workers: 8
  epochs: 240
  init_epoch: 0
  seed: 1029
  save_ep_freq: 40
  print_iter_freq: 100
  gpu_preserve: False
validation:
  batch_size: 64
  num_workers: 8
kd:
  teacher:
    name: vgg13
    checkpoint: run/vgg13.pth
  student:
    name: vgg8
  loss_weights:
    classify_weight: 2
    kd_weight: 1
    other_kd: 1000
kd_loss:
  KD_T: 4
  name: AT
  T: 4
  homo: True
  feat_dim: 128
pretrain:
  epochs: 30
  optimizer:
    name: SGD
    lr: 0.01
    momentum: 0.9
    weight_decay: 5e-4
"""


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(content: str | bytes, *overrides: str) -> Config:
    return load_config(write("x.yml", content), overrides)
