"""The files under configs/: all there, all valid, and with the published values."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from config_texts import PUBLISHED as PUBLISHED_FILE

from utils.config import Config, find_config, load_config
from utils.config.changes import flatten

REPO = Path(__file__).resolve().parents[2]

# (teacher, student, homo)
PAIRS = {
    "cifar-100": [
        ("resnet56", "resnet20", True),
        ("resnet110", "resnet32", True),
        ("resnet32x4", "resnet8x4", True),
        ("vgg13", "vgg8", True),
        ("wrn_40_2", "wrn_16_2", True),
        ("ResNet50", "MobileNetV2", False),
        ("ResNet50", "vgg8", False),
        ("vgg13", "MobileNetV2", False),
        ("wrn_40_2", "ShuffleNetV1", False),
        ("resnet32x4", "resnet32", False),
    ],
    "tiny-imagenet": [
        ("resnet56", "resnet20", True),
        ("resnet110", "resnet20", True),
        ("vgg13", "vgg8", True),
        ("wrn_40_2", "wrn_16_2", True),
        ("vgg13", "MobileNetV2", False),
    ],
}
DIGITS_PAIRS = [("vgg13", "vgg8", True), ("resnet20", "resnet8", True)]

# beta of each distiller; those of the logits alone have none
BETA = {"fitnet": 1, "at": 1000, "sp": 3000, "cc": 0.02, "vid": 1, "rkd": 1, "pkt": 30000, "ft": 200}
BETA |= {"fsp": 50, "nst": 50, "crd": 0.8, "reviewkd": 1}
NEW = ["nkd", "wttm"]
METHODS = ["kd", "dkd", "dist", *NEW, *BETA]

# weight of the other classes under DKD, on CIFAR-100; 8 elsewhere
NONTARGET = dict.fromkeys([("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("wrn_40_2", "wrn_16_2")], 6)
NONTARGET |= dict.fromkeys([("resnet56", "resnet20"), ("resnet110", "resnet32")], 2)

SINGLES = {
    "cifar-100": "MobileNetV2 ResNet50 ShuffleNetV1 resnet110 resnet20 resnet32 resnet32x4 resnet56 resnet8x4 vgg13 "
    "vgg8 wrn_16_2 wrn_40_2",
    "tiny-imagenet": "MobileNetV2 resnet110 resnet20 resnet56 vgg13 vgg8 wrn_16_2 wrn_40_2",
    "digits": "MobileNetV2 ShuffleNetV1 resnet20 resnet56 resnet8 vgg13 vgg8 wrn_16_2 wrn_40_2",
}

PUBLISHED = [
    (dataset, method, *pair)
    for dataset, pairs in PAIRS.items()
    for method, pair in itertools.product(METHODS, pairs)
    # FSP compares products of channels, which only networks of one family share; the newest ones were tried on these.
    if (pair[2] or method not in ("fsp", *NEW)) and (dataset == "cifar-100" or method not in NEW)
]
EXPERIMENTS = sorted(path.relative_to(REPO) for path in REPO.glob("configs/*/seed-*/*/*.yml"))


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


@pytest.mark.parametrize(("dataset", "method"), sorted({case[:2] for case in PUBLISHED}))
def test_a_published_pair_has_the_published_values_which_composing_gives_too(dataset, method, bases):
    for teacher, student, homo in (case[2:] for case in PUBLISHED if case[:2] == (dataset, method)):
        config = load_config(f"configs/{dataset}/seed-1029/{method}/{teacher}-{student}.yml")
        names = {"kd.teacher.name": teacher, "kd.student.name": student, "kd_loss.homo": homo}
        assert_says(config, dataset, student, expected(dataset, method, (teacher, student)) | names)
        assert config.validation.batch_size in (None, config.training.batch_size)

        composed = find_config(dataset, 1029, teacher=teacher, student=student, distiller=method, root=bases)
        assert composed.path is None
        # Exceptions of single pairs, which no rule knows.
        keys = ("training.batch_size", "validation.batch_size", "pretrain.optimizer.lr", "kd_loss.logits_options")
        keys += ("kd.loss_weights.other_kd",) * (method == "reviewkd")
        settings = flatten(config.to_dict(), whole=keys)
        assert composed.load(f"{key}={json.dumps(settings[key])}" for key in keys) == config


def test_a_published_single_model_has_the_published_values():
    for dataset in PAIRS:
        for model in SINGLES[dataset].split():
            config = load_config(f"configs/{dataset}/seed-1029/single/{model}.yml")
            batches = {"training.batch_size": 64, "validation.batch_size": 128}
            assert_says(config, dataset, model, {"model.name": model} | batches)


def test_no_experiment_is_missing_and_none_is_left_over():
    wanted = {f"{dataset}/{method}/{teacher}-{student}" for dataset, method, teacher, student, _ in PUBLISHED}
    wanted |= {f"digits/{method}/{pair[0]}-{pair[1]}" for method in METHODS for pair in DIGITS_PAIRS}
    wanted |= {f"{dataset}/single/{model}" for dataset, models in SINGLES.items() for model in models.split()}
    found = {
        f"{dataset}/{method}/{Path(name).stem}" for _, dataset, _, method, name in (path.parts for path in EXPERIMENTS)
    }
    assert {name for name in found if not name.startswith("imagenet/")} == wanted
    assert len(wanted) == (10 * 14 + 5 * 3) + (5 * 14 + 4) + 2 * 17 + (13 + 8 + 9)


def test_every_file_stands_where_the_launchers_look_for_it():
    for path in EXPERIMENTS:
        config = load_config(path)
        kd, names = config.kd, {"model": config.model and config.model.name}
        if kd:
            names = {"teacher": kd.teacher.name, "student": kd.student.name, "distiller": config.kd_loss.name}
        found = find_config(path.parts[1], 1029, **names)
        assert (found.path, found.load()) == (path, config)
        if path.parts[1] == "digits":  # takes minutes, and no worker processes
            assert config.training.epochs < 100
            assert config.training.num_workers == config.validation.num_workers == 0


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
