"""Finding or composing the config for what a launcher names."""

from pathlib import Path

import pytest
from config_texts import write
from refusals import refusal

from distillers import DISTILLERS
from utils.config import Config, find_config
from utils.config.find import LOGITS_ALONE
from utils.config.names import same_family

AT = {"teacher": "vgg13", "student": "vgg8", "distiller": "at"}


@pytest.fixture(autouse=True)
def _with_a_few_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("configs/base/at.yml", "kd: {loss_weights: {other_kd: 1000}}\nkd_loss: {name: at}\n")
    write("configs/base/single.yml", "validation: {batch_size: 128}\n")
    write("configs/cifar-100/base.yml", "dataset: {name: cifar-100}\ntraining: {epochs: 9}\n")
    write("configs/mydata/base.yml", "dataset: {name: imagefolder, label: mydata, root: data/mine}\n")


def write_pair(seed: int, epochs: int) -> None:
    write(
        f"configs/cifar-100/seed-{seed}/at/vgg13-vgg8.yml",
        f"base: [../../../base/at.yml, ../../base.yml]\ntraining: {{epochs: {epochs}}}\n"
        "kd: {teacher: {name: vgg13}, student: {name: vgg8}}\n",
    )


def load(*args, **names) -> Config:
    return find_config(*args, **names).load()


def test_the_file_of_the_seed_is_taken_else_the_published_one_else_any():
    for seed, epochs in ((3, 30), (1029, 10), (7, 70)):
        write_pair(seed, epochs)
        found = find_config("cifar-100", 7, **AT)
        path, own = (Path(f"configs/cifar-100/seed-{number}/at/vgg13-vgg8.yml") for number in (seed, 7))
        assert found.note == (f"{path} with training.seed=7 (there is no {own})" if seed != 7 else str(own))
        assert (found.load().training.epochs, found.load().training.seed) == (epochs, 7)


def test_else_a_pair_is_composed_from_the_bases():
    found = find_config("cifar-100", 7, **AT)
    config = found.load()
    assert found.note == (
        "composed from configs/base/at.yml and configs/cifar-100/base.yml, homo true "
        "(there is no configs/cifar-100/seed-7/at/vgg13-vgg8.yml)"
    )
    assert (config.training.seed, config.training.epochs, config.training.lr) == (7, 9, 0.05)
    assert (config.kd_loss.name, config.kd_loss.homo, config.kd.loss_weights.other_kd) == ("at", True, 1000)


@pytest.mark.parametrize("model", ["MobileNetV2", "torchvision.models.mobilenet_v2", "ShuffleV1"])
def test_a_single_model_is_composed_alike_a_light_one_with_a_small_learning_rate(model):
    found = find_config("cifar-100", 7, model=model)
    config = found.load()
    assert f"training.lr 0.01 as is usual for {model} (there is no" in found.note
    assert (config.model.name, config.training.lr, config.validation.batch_size) == (model, 0.01, 128)


def test_a_folder_of_your_own_works_like_the_others_and_may_say_something_about_pairs_alone():
    write("configs/mydata/distill.yml", "base: base.yml\nkd: {loss_weights: {classify_weight: 2}}\n")
    config = find_config("mydata", 1, **AT).load()
    assert (config.dataset.name, config.dataset.root) == ("imagefolder", "data/mine")
    assert config.run_dir == Path("run/mydata/1/adaptive-at/vgg13-vgg8")
    assert config.kd.loss_weights.classify_weight == 2
    assert find_config("mydata", 1, model="vgg8").load().kd is None


def test_a_distiller_of_features_is_balanced_on_images_of_ones_own_unless_a_file_says_otherwise():
    found = find_config("mydata", 1, **AT)
    assert found.load().kd.balance == 0.5
    assert ", kd.balance 0.5 as for all images of one's own (there is no " in found.note
    assert found.load(["kd.balance=null"]).kd.balance is None
    assert find_config("cifar-100", 1, **AT).load().kd.balance is None
    assert [name for name in DISTILLERS if DISTILLERS.get(name).logits_only] == sorted(
        LOGITS_ALONE, key=list(DISTILLERS).index
    )
    assert find_config("mydata", 1, **AT | {"distiller": "kd"}).load().kd.balance is None
    write("configs/mydata/distill.yml", "base: base.yml\nkd: {balance: null}\n")
    assert find_config("mydata", 1, **AT).load().kd.balance is None


def test_data_set_and_distiller_may_be_spelt_as_in_the_papers_and_overrides_leave_what_was_found_as_it_was():
    write_pair(seed=1, epochs=10)
    found = find_config("Cifar100", 1, **{**AT, "distiller": "AT"})
    assert found.load(["training.epochs=2", "training.seed=3"]).training.epochs == 2
    assert found.load().training.epochs == 10
    write("configs/base/reviewkd.yml", "kd: {loss_weights: {other_kd: 5}}\n")
    assert find_config("cifar-100", 1, **{**AT, "distiller": "Review-KD"}).load().kd.loss_weights.other_kd == 5


def test_an_import_path_is_looked_up_as_a_whole():
    write_pair(seed=1, epochs=10)
    composed = find_config("cifar-100", 1, **AT | {"student": "mylib.nets.vgg8"})
    assert composed.note.startswith("composed from")
    assert composed.load().kd.student.name == "mylib.nets.vgg8"


def test_a_distiller_without_a_base_is_judged_by_its_name():
    assert find_config("cifar-100", 1, **{**AT, "distiller": "sp"}).load().kd_loss.name == "sp"
    assert refusal(load, "cifar-100", 1, **{**AT, "distiller": "att"}).startswith(
        "configs/cifar-100/seed-1/att/vgg13-vgg8.yml (composed): kd_loss.name: unknown distiller 'att': "
    )


INCOMPLETE = "command line: give a model to train, or a teacher, a student and a distiller"
THERE = "those with a base.yml are broken, cifar-100, mydata, nothing"
NO_NAME = "must be letters, digits, underscores, dashes and dots"


@pytest.mark.parametrize(
    ("dataset", "seed", "names", "expected"),
    [
        ("broken", 1, AT, "configs/broken/base.yml: training.epochs: found 0"),
        ("nothing", 1, AT, "configs/nothing/base.yml: dataset: found 'imagefolder'"),
        ("mydata", -1, AT, "command line: training.seed: found -1"),
        ("cifar-10", 1, AT, "command line: no dataset 'cifar-10' in configs: did you mean 'cifar-100'? " + THERE),
        *(("cifar-100", 1, names, INCOMPLETE) for names in ({}, {"teacher": "a"}, AT | {"model": "a"})),
        *(
            ("cifar-100", 1, {"model": name}, f"(composed): model.name: found {name!r}: {NO_NAME}")
            for name in ("../x", "a**", ".")
        ),
    ],
)
def test_what_cannot_be_is_told_with_the_file_to_blame(dataset, seed, names, expected):
    write("configs/broken/base.yml", "dataset: {name: cifar-100}\ntraining: {epochs: 0}\n")
    write("configs/nothing/base.yml", "dataset: imagefolder\n")
    assert expected in refusal(load, dataset, seed, **names)


@pytest.mark.parametrize(
    ("teacher", "student", "same"),
    [
        ("resnet110", "resnet20", True),
        ("torchvision.models.resnet34", "torchvision.models.resnet18", True),
        ("wrn_40_2", "wrn_40_1", False),
        ("resnet32x4", "resnet32", False),
        ("ResNet50", "resnet20", False),
        ("ShuffleNetV1", "ShuffleNetV2", False),
        ("vgg13", "vgg8-imagenet", False),
    ],
)
def test_networks_of_one_family_differ_in_depth_alone(teacher, student, same):
    assert same_family(teacher, student) == same
