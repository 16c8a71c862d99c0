"""The files under configs/: all there, all valid, and with the published values."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from config_texts import PUBLISHED as PUBLISHED_FILE

from utils.config import Config, find_config, load_config
from utils.config.changes import flatten

REPO = Path(__file__).resolve().parents[2]

# Pairs of one family. FSP compares products of channels, which only these share.
HOMO = ["resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20", "resnet32x4-resnet8x4", "vgg13-vgg8"]
HOMO += ["wrn_40_2-wrn_16_2", "resnet20-resnet8", "torchvision.models.resnet34-torchvision.models.resnet18"]

# beta of each distiller; those of the logits alone have none
BETA = {"fitnet": 1, "at": 1000, "sp": 3000, "cc": 0.02, "vid": 1, "rkd": 1, "pkt": 30000, "ft": 200}
BETA |= {"fsp": 50, "nst": 50, "crd": 0.8, "reviewkd": 1}
OF_FEW = ("fsp", "nkd", "wttm")  # the newest were tried on pairs of one family, too
METHODS = ["kd", "dkd", "dist", "nkd", "wttm", *BETA]

# weight of the other classes under DKD, on CIFAR-100; 8 elsewhere
NONTARGET = dict.fromkeys([("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("wrn_40_2", "wrn_16_2")], 6)
NONTARGET |= dict.fromkeys([("resnet56", "resnet20"), ("resnet110", "resnet32")], 2)

EXPERIMENTS = sorted(path.relative_to(REPO) for path in REPO.glob("configs/*/seed-*/*/*.yml"))
FOLDERS = Counter((path.parts[1], path.parts[3]) for path in EXPERIMENTS)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """configs/ without the experiments."""
    root = tmp_path_factory.mktemp("configs")
    return shutil.copytree(REPO / "configs", root, ignore=shutil.ignore_patterns("seed-*"), dirs_exist_ok=True)


def expected(dataset: str, method: str, pair: tuple[str, str]) -> dict[str, Any]:
    """What the papers and the published code set, by keys of the config; None is the distiller's own."""
    of_pair = (dataset, method, *pair)
    halved = [("ResNet50", "MobileNetV2"), ("wrn_40_2", "ShuffleNetV1")]
    beta = 5 if of_pair == ("cifar-100", "reviewkd", "resnet32x4", "resnet8x4") else BETA.get(method)
    nontarget = NONTARGET.get(pair) if (dataset, method) == ("cifar-100", "dkd") else None
    return {
        "kd.loss_weights.classify_weight": 2 if dataset == "tiny-imagenet" or method in ("at", "vid", "rkd") else 1,
        "kd.loss_weights.kd_weight": 4 if method == "wttm" else 1,
        "kd.loss_weights.other_kd": beta,
        "kd.selection": "adaptive",
        "kd.warmup_epochs": None,
        "kd_loss.name": method,
        "kd_loss.KD_T": 4,
        "kd_loss.feat_dim": 128,
        "kd_loss.logits": None,
        "kd_loss.logits_options": {"nontarget": nontarget} if nontarget else {},
        "training.batch_size": 32 if dataset == "cifar-100" and method == "nst" and pair in halved else 64,
        "pretrain.epochs": 30,
        "pretrain.optimizer.lr": 0.05 if of_pair == ("cifar-100", "ft", "ResNet50", "vgg8") else 0.01,
        "pretrain.optimizer.momentum": 0.9,
        "pretrain.optimizer.weight_decay": 5e-4,
    }


SCHEDULE = {
    "epochs": 240,
    "init_epoch": 0,
    "seed": 1029,
    "lr_decay_epochs": [150, 180, 210],
    "lr_agent_decay_epochs": [150, 180, 210],
    "lr_decay_rate": 0.1,
    "optimizer.name": "SGD",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.weight_decay_stage2": 5e-4,
    "optimizer.weight_decay_agent": 1e-3,
}


def assert_says(config: Config, dataset: str, trained: str, values: dict[str, Any]) -> None:
    lr = 0.01 if trained in ("MobileNetV2", "ShuffleNetV1") else 0.05
    values = values | {f"training.{key}": value for key, value in SCHEDULE.items()}
    values |= {"dataset.name": dataset, "dataset.label": dataset, "training.lr": lr, "training.lr_agent": lr / 2}
    settings = flatten(config.to_dict(), whole={"kd_loss.logits_options"})
    assert {key: settings[key] for key in values} == values


@pytest.mark.parametrize(("dataset", "method"), FOLDERS)
def test_a_file_has_the_published_values_where_the_launchers_look_for_it(dataset, method, bases):
    for path in (REPO / "configs" / dataset / "seed-1029" / method).iterdir():
        config, networks = load_config(path), path.stem.split("-")
        roles = {"model": networks[0]} if method == "single" else dict(zip(("teacher", "student"), networks))
        names = roles if method == "single" else roles | {"distiller": method}
        found = find_config(dataset, 1029, **names)
        assert (REPO / found.note, found.load()) == (path, config)
        if dataset == "digits":  # takes minutes, and no worker processes
            assert config.training.epochs < 100
            assert config.training.num_workers == config.validation.num_workers == 0
        elif dataset != "imagenet" and method == "single":
            batches = {"training.batch_size": 64, "validation.batch_size": 128}
            assert_says(config, dataset, networks[0], {"model.name": networks[0]} | batches)
        elif dataset != "imagenet":
            known = {f"kd.{role}.name": name for role, name in roles.items()} | {"kd_loss.homo": path.stem in HOMO}
            assert_says(config, dataset, networks[1], expected(dataset, method, tuple(networks)) | known)
            assert config.validation.batch_size in (None, config.training.batch_size)
            assert compose(bases, dataset, names, config) == config


def compose(bases: Path, dataset: str, names: dict[str, str], config: Config) -> Config:
    """What the launchers would compose without the file, with its exceptions, which no rule knows."""
    composed = find_config(dataset, 1029, **names, root=bases)
    assert composed.note.startswith("composed from")
    keys = ("training.batch_size", "validation.batch_size", "pretrain.optimizer.lr", "kd_loss.logits_options")
    keys += ("kd.loss_weights.other_kd",) * (names["distiller"] == "reviewkd")
    settings = flatten(config.to_dict(), whole=keys)
    return composed.load(f"{key}={json.dumps(settings[key])}" for key in keys)


def test_no_experiment_is_missing_and_none_is_left_over():
    wanted = {("cifar-100", method): 5 if method in OF_FEW else 10 for method in METHODS}
    wanted |= {("tiny-imagenet", method): 5 for method in METHODS if method not in OF_FEW} | {
        ("tiny-imagenet", "fsp"): 4
    }
    wanted |= {("digits", method): 2 for method in METHODS}
    wanted |= {("cifar-100", "single"): 13, ("tiny-imagenet", "single"): 8, ("digits", "single"): 9}
    wanted |= {("imagenet", "single"): 2} | {("imagenet", method): 1 for method in ("at", "crd", "kd", "rkd")}
    assert wanted == FOLDERS
    for path in EXPERIMENTS:
        assert path.parts[3] not in OF_FEW or path.stem in HOMO


def test_a_file_in_the_published_format_gives_the_same_config_as_ours(tmp_path):
    spelt_out = tmp_path / "vgg13-vgg8.yml"
    spelt_out.write_text(PUBLISHED_FILE)
    # What a published file repeats of the data set's and the machine's properties, ours leave to their defaults.
    repeated = ["dataset={root: ./datasets/, img_h: 32, img_w: 32, num_classes: 100}", "training.optimizer.lr=0.05"]
    repeated += ["training.save_ep_freq=40", "training.num_workers=8", "validation.num_workers=8"]
    repeated += ["kd.teacher.checkpoint=run/vgg13.pth", "kd_loss.T=4", "validation.batch_size=64"]
    assert load_config(spelt_out) == load_config("configs/cifar-100/seed-1029/at/vgg13-vgg8.yml", repeated)


@pytest.mark.parametrize("dataset", [file.parent.name for file in REPO.glob("configs/*/base.yml")])
def test_every_data_set_composes_any_pair_and_any_model(dataset):
    assert find_config(dataset, 5, model="vgg11").load().dataset.label == dataset
    config = find_config(dataset, 5, teacher="wrn_40_2", student="ShuffleNetV2", distiller="SP").load()
    assert (config.dataset.label, config.training.seed, config.kd.loss_weights.other_kd) == (dataset, 5, 3000)


def test_imagenet_follows_the_usual_recipe():
    pair = "torchvision.models.resnet34-torchvision.models.resnet18"
    config = load_config(f"configs/imagenet/seed-1029/at/{pair}.yml")
    training = config.training
    assert (training.epochs, training.batch_size, training.lr) == (100, 256, 0.1)
    assert training.lr_decay_epochs == (30, 60, 90)
    assert training.optimizer.weight_decay == training.optimizer.weight_decay_stage2 == 1e-4
    assert config.run_dir == Path(f"run/imagenet/1029/adaptive-at/{pair}")
