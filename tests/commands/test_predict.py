"""Predicting the classes of image files by a trained network; its exported forms are in test_export.py."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image

from utils import predict
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.training.restore import restore


@pytest.fixture
def digits(trained_run, tmp_path):
    """A folder with the first validation images of the run, and their logits."""
    restored = restore(trained_run)
    images = next(iter(restored.val.epoch(0))).image[:6]
    for number, image in enumerate(images):
        pixels = (image * 0.3246 + 0.3077).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        folder = tmp_path / "digits" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with torch.inference_mode():
        return tmp_path / "digits", restored.student()(images)


def test_every_image_has_a_line_by_path_and_one_that_cannot_be_read_is_named(
    trained_run, digits, tmp_path, caplog, capsys
):
    folder, logits = digits
    (folder / "broken.png").write_bytes(b"\x89PNG")
    words = [str(trained_run), str(folder), str(tmp_path / "out.csv")]
    assert predict.main(words) == 0
    assert f"{folder}/broken.png: cannot be read as an image" in caplog.text
    assert "6 images; 1 could not be read" in capsys.readouterr().out
    header, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
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
