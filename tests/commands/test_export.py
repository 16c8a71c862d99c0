"""Networks that ship: exported files compute the same; predictions are those that evaluation finds."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from documents import REPOSITORY, blocks, execute
from pictures import image_folder, noise, save
from PIL import Image
from torch import nn

from models import get_model, original
from utils import export, predict
from utils.config import Config
from utils.errors import UserError
from utils.evaluate import scores
from utils.export import exported, onnx
from utils.export.command import compare, export_program
from utils.export.exported import OnnxNetwork
from utils.run_folder.checkpoint import read_checkpoint
from utils.training.restore import restore
from utils.training.run import train

ONNX = ("onnx", "onnxscript", "onnxruntime")
BLOCKS = [[1, 8, 1, 2], [2, 8, 1, 1]]  # a MobileNetV2 that is exported within seconds
MOBILENET = {"inverted_residual_setting": BLOCKS, "width_mult": 0.5}
NAMES = ("student.onnx", "student.half.onnx", "student.int8.onnx")
CLASSES = ("ant", "bee, wild", "éel")


def write_images(folder: Path) -> None:
    """Smooth pictures, and to validate on also one with transparent pixels, one of 16 bits and one that is turned."""
    image_folder(folder, train=5, val=6, classes=CLASSES, size=(50, 80))
    pixels, turned = noise(80, 50, 4), Image.Exif()
    turned[0x112] = 6
    Image.fromarray(pixels).save(folder / "val" / CLASSES[0] / "000.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "val" / CLASSES[1] / "000.png")
    Image.fromarray(pixels[..., :3]).save(folder / "val" / CLASSES[2] / "turned.jpg", exif=turned)


@pytest.fixture(scope="session")
def shipped(once, tmp_path_factory) -> Path:
    """A folder with ``run``, ``images``, and all exported forms of the run's network, ``student.*``."""
    for package in ONNX:
        pytest.importorskip(package)
    return Path(once("shipped", lambda: ship(tmp_path_factory.mktemp("shipped"))))


def ship(folder: Path) -> str:
    torch.set_num_threads(1)
    write_images(folder / "images")
    sizes = {"img_h": 66, "img_w": 72}  # more than 64: the margins are cut off
    unsure = {"lr": 0.02, "seed": 3}  # in 8 bits it gives about a quarter of the images another class
    config = Config.from_dict(
        {
            "dataset": {"name": "imagefolder", "root": str(folder / "images"), **sizes},
            "model": {"name": "torchvision.models.mobilenet_v2", "kwargs": MOBILENET},
            "training": {"epochs": 1, "batch_size": 8, "num_workers": 0, "device": "cpu", **unsure},
            "validation": {"num_workers": 0},
            "run": {"root": str(folder / "runs")},
        }
    )
    train(config)
    (folder / "run").symlink_to(config.run_dir)
    assert export.main([str(folder / "run"), "--int8", "--half", "--out", str(folder / "student.pt2")]) == 0
    return str(folder)


def predicted(network: Path, images: Path, out: Path) -> list[dict[str, str]]:
    assert predict.main([str(network), str(images), str(out), "--trust"]) == 0
    with out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


FORMS = ("run", "run/ckpt/best.pth", "student.pt2", "student.onnx", "student.int8.onnx")


def test_every_form_predicts_what_evaluation_finds(shipped, tmp_path):
    told = json.loads((shipped / "student.json").read_text())["evaluation"]
    restored = restore(shipped / "run")
    found = scores(restored.student(), restored)
    first = next(iter(told.values()))
    assert first.pop("milliseconds") > 0
    assert first == {**found.values(), "per_class": found.per_class(), "agreement": 100}
    chances = {}
    for form in FORMS:
        rows = predicted(shipped / form, shipped / "images/val", tmp_path / f"{Path(form).name}.csv")
        files = [row["image"] for row in rows]
        assert files == sorted(files)
        right = [row["predicted"] == Path(row["image"]).parent.name for row in rows]
        name = form if form in told else next(iter(told))
        assert told[name]["top1"] == pytest.approx(100 * np.mean(right)), form
        same = [row["predicted"] == CLASSES[k] for row, k in zip(rows, found.predicted.tolist())]
        assert told[name]["agreement"] == pytest.approx(100 * np.mean(same)), form
        assert told[name]["agreement"] == 100 or "int8" in form  # where some CPUs agree as well
        chances[form] = [float(row["probability"]) for row in rows]
    assert chances["student.onnx"] == pytest.approx(chances["run"], abs=1e-4)
    assert chances["student.int8.onnx"] != pytest.approx(chances["run"], abs=1e-4)


def test_smaller_files_have_fewer_bits_and_every_file_says_how_images_are_prepared(shipped):
    plain, half, int8 = (file.stat().st_size for file in map(shipped.joinpath, NAMES))
    assert max(half, int8) < 0.8 * plain
    told = json.loads((shipped / "student.json").read_text())
    evaluation = told.pop("evaluation")
    assert list(evaluation)[1:] == list(NAMES)
    assert evaluation["student.half.onnx"]["agreement"] > 90
    assert (told["image_size"], told["resize"], told["classes"]) == ([66, 72], [75, 82], list(CLASSES))
    texts = OnnxNetwork(shipped / "student.int8.onnx").description
    assert {key: json.loads(text) for key, text in texts.items()} == told


def test_the_lines_in_the_docs_predict_without_this_repository(shipped, tmp_path, monkeypatch, capsys):
    (code,) = (text for text in blocks((REPOSITORY / "docs/running.md").read_text(), "python") if "onnxruntime" in text)
    assert not {"utils", "datasets", "torch"} & set(code.split())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.onnx").symlink_to(shipped / "student.onnx")
    for size in ((90, 50), (50, 91), (3, 2), (200, 3)):
        Image.fromarray(noise(*size, 3)).save(tmp_path / "image.png")
        (row,) = predicted(tmp_path / "student.onnx", tmp_path / "image.png", tmp_path / "out.csv")
        capsys.readouterr()
        execute("shown", code)
        *name, chance = capsys.readouterr().out.split()
        assert (" ".join(name), float(chance)) == (row["predicted"], pytest.approx(float(row["probability"]), abs=1e-4))


@pytest.fixture
def network():
    """Of a convolution and a linear layer; takes 9x9 pixels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize("package", ["torch", "timm"])
def test_a_file_takes_so_many_images_at_a_time_and_any_number_of_them_is_run(network, tmp_path, package):
    for name in (*ONNX, package):
        pytest.importorskip(name)
    images = torch.randn(5, 3, 9, 9)
    if package == "timm":
        images, network = torch.randn(5, 3, 33, 33), original(get_model("timm/test_efficientnet", 3)).eval()
    model = onnx.export_onnx(network, images, tmp_path / "x.onnx", 19, batch=3)
    assert [entry.version for entry in model.opset_import] == [19]
    onnx.save_onnx(model, tmp_path / "x.onnx", {})
    found = OnnxNetwork(tmp_path / "x.onnx")
    assert found.batch == 3
    with torch.inference_mode():
        torch.testing.assert_close(found(images), network(images))


def test_what_onnx_cannot_write_is_refused_in_one_line(network, tmp_path, monkeypatch):
    def export_to(opset):
        return onnx.export_onnx(network, torch.randn(3, 3, 9, 9), tmp_path / "x.onnx", opset, None)

    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("step 3 of 4") from ValueError("no function for aten.pool")

    model = SimpleNamespace(opset_import=[SimpleNamespace(domain="", version=18)])
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=model))
    with pytest.raises(UserError, match="--opset: the network cannot be written in version 7"):
        export_to(7)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"x\.onnx: ONNX has no form of the network: no function for aten\.pool$"):
        export_to(None)


def test_a_missing_package_and_a_wrong_ending_are_told_first(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "find_spec", lambda name: None if name.startswith("onnxr") else name)
    (tmp_path / "x.onnx").touch()
    words = [str(tmp_path / "x.onnx"), str(tmp_path), str(tmp_path / "out.csv")]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for command in (lambda: export.main([str(trained_run), "--int8"]), lambda: predict.main(words)):
        with pytest.raises(UserError, match=r"ONNX needs onnxruntime: python -m pip install onnxruntime$"):
            command()
    with pytest.raises(UserError, match=r"--out: x\.onnx: must end in \.pt2"):
        export.main([str(trained_run), "--out", "x.onnx"])


def test_the_exported_program_gives_the_same_logits(trained_run, tmp_path, capsys):
    file = tmp_path / "student.pt2"
    assert export.main([str(trained_run), "validation.batch_size=1", "--out", str(file)]) == 0
    assert "same logits on batches of 8, 3 and 1" in capsys.readouterr().out
    assert file.stat().st_size < 1_000_000
    images = torch.randn(5, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(torch.export.load(file).module()(images), restore(trained_run).student()(images))
    told = json.loads(file.with_suffix(".json").read_text())
    assert told["mean"] == pytest.approx([0.3077] * 3)
    assert told["classes"] == list("0123456789")


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    for found in (0.1, float("nan")):
        other = lambda images, found=found: torch.full((len(images), 3), found)  # noqa: E731
        with pytest.raises(UserError, match="other logits"):
            compare(tmp_path / "x", lambda images: torch.zeros(len(images), 3), other, torch.zeros(8, 1))


def test_a_network_that_normalises_its_input_in_place_is_compared_on_equal_images(tmp_path):
    images = torch.ones(8, 2)
    assert "largest difference 0" in compare(
        tmp_path / "x", lambda batch: batch.mul_(2), lambda batch: 2 * batch, images
    )
    assert torch.equal(images, torch.ones(8, 2))


def test_a_network_that_cannot_be_exported_is_refused_in_one_line(tmp_path, capsys):
    class Choosing(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with pytest.raises(UserError, match=r"x\.pt2: exporting the network by torch\.export failed: "):
        export_program(Choosing(), torch.zeros(3, 3, 8, 8), tmp_path / "x.pt2")
    assert capsys.readouterr().err == "", "PyTorch prints the graph"


@pytest.fixture
def digits(trained_run, tmp_path):
    """A folder with the first validation images of the run, and their logits."""
    restored = restore(trained_run)
    images = next(iter(restored.val.epoch(0))).image[:6]
    for number in range(6):
        save(restored.source.val.picture(number), tmp_path / "digits" / str(number % 2) / f"{number}.png")
    with torch.inference_mode():
        return tmp_path / "digits", restored.student()(images)


def test_every_image_has_a_line_by_path_and_one_that_cannot_be_read_is_named(
    trained_run, digits, tmp_path, caplog, capsys
):
    folder, logits = digits
    folder = folder.rename(folder.with_name(os.fsdecode(b"V\xf6gel")))  # as old Windows systems write it
    (folder / "broken.png").write_bytes(b"\x89PNG")
    words = [str(trained_run), str(folder), str(tmp_path / "out.csv")]
    assert predict.main(words) == 0
    assert "gel/broken.png: cannot be read as an image" in caplog.text
    assert "6 images; 1 could not be read" in capsys.readouterr().out
    header, *rows = csv.reader((tmp_path / "out.csv").read_text(errors="surrogateescape").splitlines())
    assert header == ["image", "predicted", "probability"]
    chances, classes = logits.softmax(dim=1).max(dim=1)
    order = [0, 2, 4, 1, 3, 5]
    assert [row[:2] for row in rows] == [[f"{folder}/{k % 2}/{k}.png", str(classes[k].item())] for k in order]
    assert [float(row[2]) for row in rows] == pytest.approx(chances[order].tolist(), abs=1e-3)
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        predict.main([words[0], str(folder / "broken.png"), str(tmp_path / "new.csv")])
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(UserError, match=r"out\.csv: exists already"):
        predict.main(words)
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert not (tmp_path / "new.csv").exists()


def test_a_checkpoint_predicts_where_its_data_its_policy_and_its_distiller_are_not(trained_run, digits, tmp_path):
    content = read_checkpoint(trained_run / "ckpt/best.pth")
    content["config"]["dataset"] |= {"name": "imagefolder", "root": "nowhere"}
    content["config"]["kd"]["policy"] = content["config"]["kd_loss"]["name"] = "of_another_machine"
    torch.save(content, tmp_path / "moved.pth")
    words = [str(tmp_path / "moved.pth"), str(digits[0]), str(tmp_path / "out.csv")]
    assert predict.main(words) == 0
    del content["data"]["resize"]  # as older versions wrote it
    torch.save(content, tmp_path / "moved.pth")
    with pytest.raises(UserError, match=r"dataset\.root: nowhere"):
        predict.main(words)


def test_a_program_is_not_unpickled_unasked(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "x.pt2").touch()
    with pytest.raises(UserError, match=r"x\.pt2: PyTorch unpickles such a file, .*--trust"):
        predict.main([str(tmp_path / "x.pt2"), str(tmp_path), str(tmp_path / "out.csv")])
    with pytest.raises(UserError, match=r"^training\.device=cpu: an exported file is used as it is"):
        predict.main([str(tmp_path / "x.pt2"), str(tmp_path), str(tmp_path / "out.csv"), "training.device=cpu"])
