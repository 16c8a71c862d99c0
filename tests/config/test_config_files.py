"""The files under configs/: all there, all valid, and with the published values."""

import itertools
import json
from pathlib import Path

import pytest
from config_texts import PUBLISHED as PUBLISHED_FILE

from models import get_model
from utils.config import find_config, load_config

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
METHODS = ["kd", "dkd", "dist", *BETA]

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
    if method != "fsp" or pair[2]  # FSP compares products of channels, which only networks of one family share
]
EXPERIMENTS = sorted(path.relative_to(REPO) for path in REPO.glob("configs/*/seed-*/*/*.yml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def expected_gamma(dataset: str, method: str) -> int:
    return 2 if dataset == "tiny-imagenet" or method in ("at", "vid", "rkd") else 1


def expected_beta(dataset: str, method: str, teacher: str, student: str) -> float | None:
    exception = ("cifar-100", "reviewkd", "resnet32x4", "resnet8x4")
    return 5 if (dataset, method, teacher, student) == exception else BETA.get(method)


def expected_logits_options(dataset: str, method: str, teacher: str, student: str) -> dict[str, int]:
    exceptional = (dataset, method) == ("cifar-100", "dkd") and (teacher, student) in NONTARGET
    return {"nontarget": NONTARGET[teacher, student]} if exceptional else {}


def expected_lr(model: str) -> float:
    return 0.01 if model in ("MobileNetV2", "ShuffleNetV1") else 0.05


def expected_batch(dataset: str, method: str, teacher: str, student: str) -> int:
    halved = [("ResNet50", "MobileNetV2"), ("wrn_40_2", "ShuffleNetV1")]
    return 32 if dataset == "cifar-100" and method == "nst" and (teacher, student) in halved else 64


def expected_pretraining_lr(dataset: str, method: str, teacher: str, student: str) -> float:
    return 0.05 if (dataset, method, teacher, student) == ("cifar-100", "ft", "ResNet50", "vgg8") else 0.01


@pytest.mark.parametrize(("dataset", "method", "teacher", "student", "homo"), PUBLISHED)
def test_a_published_pair_has_the_published_values(dataset, method, teacher, student, homo):
    config = load_config(f"configs/{dataset}/seed-1029/{method}/{teacher}-{student}.yml")
    assert config.dataset.name == config.dataset.label == dataset
    assert (config.kd.teacher.name, config.kd.student.name) == (teacher, student)
    assert (config.kd_loss.name, config.kd_loss.homo, config.kd_loss.KD_T) == (method, homo, 4)
    assert config.kd_loss.feat_dim == 128
    assert config.kd.selection == "adaptive"
    weights = config.kd.loss_weights
    assert (weights.classify_weight, weights.kd_weight) == (expected_gamma(dataset, method), 1)
    assert weights.other_kd == expected_beta(dataset, method, teacher, student)
    assert config.kd_loss.logits is config.kd.warmup_epochs is None  # those of the distiller
    assert config.kd_loss.logits_options == expected_logits_options(dataset, method, teacher, student)
    training = config.training
    assert training.lr == expected_lr(student)
    assert training.lr_agent == expected_lr(student) / 2
    assert training.batch_size == expected_batch(dataset, method, teacher, student)
    assert config.validation.batch_size in (None, training.batch_size)
    pretrain = config.pretrain
    assert pretrain.optimizer.lr == expected_pretraining_lr(dataset, method, teacher, student)
    assert (pretrain.epochs, pretrain.optimizer.momentum, pretrain.optimizer.weight_decay) == (30, 0.9, 5e-4)
    assert_published_schedule(training)


@pytest.mark.parametrize(
    ("dataset", "model"), [(dataset, model) for dataset in PAIRS for model in SINGLES[dataset].split()]
)
def test_a_published_single_model_has_the_published_values(dataset, model):
    config = load_config(f"configs/{dataset}/seed-1029/single/{model}.yml")
    assert (config.dataset.name, config.model.name) == (dataset, model)
    assert config.training.lr == expected_lr(model)
    assert (config.training.batch_size, config.validation.batch_size) == (64, 128)
    assert_published_schedule(config.training)


def assert_published_schedule(training) -> None:
    assert (training.epochs, training.init_epoch, training.seed) == (240, 0, 1029)
    assert training.lr_decay_epochs == training.lr_agent_decay_epochs == (150, 180, 210)
    assert training.lr_decay_rate == 0.1
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.momentum) == ("SGD", 0.9)
    decays = (optimizer.weight_decay, optimizer.weight_decay_stage2, optimizer.weight_decay_agent)
    assert decays == (5e-4, 5e-4, 1e-3)


def test_no_experiment_is_missing_and_none_is_left_over():
    expected = {f"{dataset}/{method}/{teacher}-{student}" for dataset, method, teacher, student, _ in PUBLISHED}
    expected |= {f"digits/{method}/{pair[0]}-{pair[1]}" for method in METHODS for pair in DIGITS_PAIRS}
    expected |= {f"{dataset}/single/{model}" for dataset, models in SINGLES.items() for model in models.split()}
    found = {
        f"{dataset}/{method}/{Path(name).stem}" for _, dataset, _, method, name in (path.parts for path in EXPERIMENTS)
    }
    assert {name for name in found if not name.startswith("imagenet/")} == expected
    assert len(PUBLISHED) == (10 * 14 + 5) + (5 * 14 + 4)
    assert len(expected) == len(PUBLISHED) + 2 * 15 + (13 + 8 + 9)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_file_stands_where_the_launchers_look_for_it(path):
    config = load_config(path)
    names = (
        {"model": config.model.name}
        if config.model
        else {
            "teacher": config.kd.teacher.name,
            "student": config.kd.student.name,
            "distiller": config.kd_loss.name,
        }
    )
    found = find_config(path.parts[1], 1029, **names)
    assert found.path == path
    assert found.load() == config


@pytest.mark.parametrize(("dataset", "method", "teacher", "student", "homo"), PUBLISHED)
def test_composing_gives_what_the_published_file_says(dataset, method, teacher, student, homo, tmp_path):
    (tmp_path / "base").symlink_to(REPO / "configs/base")
    (tmp_path / dataset).mkdir()
    for base in (REPO / "configs" / dataset).glob("*.yml"):
        (tmp_path / dataset / base.name).symlink_to(base)
    composed = find_config(dataset, 1029, teacher=teacher, student=student, distiller=method, root=tmp_path)
    assert composed.path is None
    published = load_config(f"configs/{dataset}/seed-1029/{method}/{teacher}-{student}.yml")
    # Exceptions of single pairs, which no rule knows.
    exceptions = [f"{section}.batch_size={published.training.batch_size}" for section in ("training", "validation")]
    exceptions += [f"pretrain.optimizer.lr={published.pretrain.optimizer.lr}"]
    exceptions += [f"kd_loss.logits_options={json.dumps(published.kd_loss.logits_options)}"]
    if method == "reviewkd":
        exceptions += [f"kd.loss_weights.other_kd={published.kd.loss_weights.other_kd}"]
    assert composed.load(exceptions) == published


def test_a_file_in_the_published_format_gives_the_same_config_as_ours(tmp_path):
    spelt_out = tmp_path / "vgg13-vgg8.yml"
    spelt_out.write_text(PUBLISHED_FILE)
    # What a published file repeats of the data set's and the machine's properties, ours leave to their defaults.
    repeated = ["dataset={root: ./datasets/, img_h: 32, img_w: 32, num_classes: 100}", "training.optimizer.lr=0.05"]
    repeated += ["training.save_ep_freq=40", "training.num_workers=8", "validation.num_workers=8"]
    repeated += ["kd.teacher.checkpoint=run/vgg13.pth", "kd_loss.T=4"]
    assert load_config(spelt_out) == load_config("configs/cifar-100/seed-1029/at/vgg13-vgg8.yml", repeated)


@pytest.mark.parametrize("pair", PAIRS["cifar-100"], ids=str)
def test_fsp_is_configured_where_the_channels_of_both_networks_agree(pair):
    teacher, student, _ = pair
    channels = [[shape[0] for shape in get_model(name, 100).feature_shapes(32, 32)[:-1]] for name in (teacher, student)]
    agree = channels[0] == channels[1]
    assert Path(f"configs/cifar-100/seed-1029/fsp/{teacher}-{student}.yml").exists() == agree


@pytest.mark.parametrize("dataset", ["cifar-10", "cifar-100", "digits", "imagefolder", "imagenet", "tiny-imagenet"])
def test_every_data_set_composes_any_pair_and_any_model(dataset):
    assert find_config(dataset, 5, model="vgg11").load().dataset.name == dataset
    config = find_config(dataset, 5, teacher="wrn_40_2", student="ShuffleNetV2", distiller="SP").load()
    assert config.dataset.name == dataset
    assert config.training.seed == 5
    assert config.kd.loss_weights.other_kd == 3000


def test_imagenet_follows_the_usual_recipe():
    pair = "torchvision.models.resnet34-torchvision.models.resnet18"
    config = load_config(f"configs/imagenet/seed-1029/at/{pair}.yml")
    training = config.training
    assert (training.epochs, training.batch_size, training.lr, training.lr_decay_epochs) == (
        100,
        256,
        0.1,
        (30, 60, 90),
    )
    assert training.optimizer.weight_decay == training.optimizer.weight_decay_stage2 == 1e-4
    assert config.kd.teacher.name == "torchvision.models.resnet34"
    assert config.run_dir == Path(f"run/imagenet/1029/adaptive-at/{pair}")


def test_digits_take_minutes_and_no_worker_processes():
    for path in (path for path in EXPERIMENTS if path.parts[1] == "digits"):
        config = load_config(path)
        assert config.training.epochs < 100
        assert config.training.num_workers == config.validation.num_workers == 0
