"""Warnings of a poor result."""

import json
import shutil

import pytest
import torch
from pictures import image_folder, save, smooth_picture
from toy_runs import finish, make_engine, toy_config
from toys import toy_source

from datasets.build import find_source
from datasets.source import Source
from utils.config import Config
from utils.run_folder.layout import Layout
from utils.training.doubts import (
    constant_accuracy,
    leaked_images,
    no_progress,
    poor_teacher,
    uneven_classes,
    wide_interval,
)

LABELS = torch.tensor([0] * 6 + [1] * 3 + [2])


def config_with(**sections) -> Config:
    return Config.from_dict({"dataset": {"name": "digits"}, "model": {"name": "resnet8"}} | sections)


def source_of(*counts: int) -> Source:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return toy_source(labels, ("cat", "dog", "owl", "yak"))


def test_uneven_classes_are_named_unless_something_makes_up_for_them():
    uneven = source_of(34, 10, 3)  # no image of the fourth class, which has its own warning
    (line,) = uneven_classes(uneven, config_with())
    assert "34 training images of cat and 3 of owl" in line
    assert uneven_classes(source_of(30, 10, 3), config_with()) == []
    assert uneven_classes(uneven, config_with(dataset={"name": "digits", "sampler": "balanced"})) == []
    assert uneven_classes(uneven, config_with(training={"class_weights": "balanced"})) == []


def test_images_that_are_trained_on_and_evaluated_on_are_named(tmp_path):
    root = image_folder(tmp_path / "a", train=3, val=3)
    assert leaked_images(find_source("imagefolder", root)) == []
    shutil.copytree(root / "train", root / "test")
    (line,) = leaked_images(find_source("imagefolder", root))
    assert f"warning: test has images to train on, {root / 'test/ant/000.png'} and perhaps more" in line
    table = tmp_path / "images.csv"
    rows = [f"a/train/{name}/00{number}.png,{name}" for name in ("ant", "bee") for number in range(3)]
    table.write_text("\n".join(["image,label", *rows, *rows, *rows]))
    (line,) = leaked_images(find_source("csv", table, val_split=0.3))
    assert "warning: validation has images to train on" in line
    save(smooth_picture(8, 8), tmp_path / "b/train/ant/000.png")  # another one of that name
    table.write_text("\n".join(["image,label,split", *(f"{row},train" for row in (*rows, "b/train/ant/000.png,ant"))]))
    table.write_text(f"{table.read_text()}\n{rows[0]},val")
    (line,) = leaked_images(find_source("csv", table))
    assert f"{tmp_path / 'a/train/ant/000.png'} and perhaps more" in line


def test_the_largest_class_is_what_a_constant_network_gets():
    assert constant_accuracy(LABELS) == pytest.approx(60)
    assert constant_accuracy(LABELS, "class_mean") == pytest.approx(100 / 3)


@pytest.mark.parametrize(("epoch", "top1", "warns"), [(3, 60.0, False), (4, 60.0, True), (4, 61.0, False)])
def test_no_better_than_the_largest_class_after_a_third_of_the_epochs(epoch, top1, warns):
    config = config_with(training={"epochs": 10})
    found = no_progress({"top1": top1, "class_mean": 30.0}, epoch, LABELS, config)
    assert bool(found) is warns
    by_class = config_with(training={"epochs": 10}, validation={"best_by": "class_mean"})
    assert no_progress({"top1": 50.0, "class_mean": 40.0}, 4, LABELS, by_class) == []


def test_a_run_says_so_itself(tmp_path):
    engine = make_engine(tmp_path / "run", distiller=None, config=toy_config(lr=1e-9))
    engine.data.val.labels = torch.zeros_like(engine.data.val.labels)  # all of one class: nothing can be better
    finish(engine)
    text = (tmp_path / "run/log.txt").read_text()
    assert text.count("predicting the largest class for every image has 100.00%") == 1
    assert "warning: after 1 of 3 epochs" in text


def test_a_teacher_below_the_largest_class_or_the_student_alone(tmp_path):
    config = Config.from_dict(toy_config().to_dict() | {"run": {"root": str(tmp_path)}})
    assert "60.00" in poor_teacher(60.0, LABELS, config)[0]
    assert poor_teacher(100 * 30 / 121, torch.arange(121) // 30 % 4, config), "as good as the largest class"
    assert poor_teacher(70.0, LABELS, config) == []
    alone = Layout(tmp_path / "digits/1029/resnet8")
    alone.path.mkdir(parents=True)
    alone.result.write_text(json.dumps({"best_top1": 71.5, "last_top1": 69.0}))
    assert "less than the student alone: 71.50%" in poor_teacher(70.0, LABELS, config)[0]
    assert poor_teacher(71.5, LABELS, config) == []


def test_the_interval_of_few_images():
    (line,) = wide_interval(44.68, 188)
    assert "188 validation images: its 95 % interval is 37.8 to 51.8" in line
    assert wide_interval(74.0, 10_000) == []
