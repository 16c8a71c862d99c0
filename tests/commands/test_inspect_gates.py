"""Asking a checkpoint which spots its policy picks."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from datasets.source import Files
from distillers.spot_adaptive.policy import straight_through_gates
from utils.errors import UserError
from utils.inspect_gates import distil_chances, main, of_class, validation_chances
from utils.training.restore import restore


@pytest.fixture
def restored(trained_run):
    return restore(trained_run)


def test_policies_see_the_last_epoch_that_the_checkpoint_knows(restored):
    assert [restored.content["progress"][key] for key in ("epoch", "step")] == [1, 0], "one epoch was trained"
    assert restored.task().epoch == 0
    restored.content["progress"] = {"phase": 0, "epoch": 7, "step": 3}
    assert restored.task().epoch == 7


def give_way(task, teacher_bias):
    """Make the policy's logits the same for every image: `teacher_bias` per gate for the teacher's route, 0 against."""
    with torch.no_grad():
        task.policy.linear.weight.zero_()
        task.policy.linear.bias.copy_(torch.stack([teacher_bias, torch.zeros_like(teacher_bias)], dim=1).flatten())


def test_chances_are_how_often_training_draws_the_gate(restored):
    task = restored.task()
    give_way(task, torch.tensor([1.0, -2.0]))
    chances = distil_chances(task, torch.zeros(1, 3, 16, 16))[0]
    torch.testing.assert_close(chances, torch.tensor([1.0, -2.0]).sigmoid())
    logits = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]]).expand(20_000, -1, -1)
    drawn = straight_through_gates(logits, temperature=5.0).mean(dim=0)
    torch.testing.assert_close(drawn, chances, atol=0.02, rtol=0)
    task.selection = "anti"  # distils where the policy says not to
    torch.testing.assert_close(distil_chances(task, torch.zeros(1, 3, 16, 16))[0], 1 - chances)


def test_every_class_has_a_line_and_one_class_is_listed_image_by_image(trained_run, restored, capsys, monkeypatch):
    def lines(*words):
        assert main([str(trained_run), *words]) == 0
        text = capsys.readouterr().out.splitlines()[1:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text]

    _, label, chances = validation_chances(restored, restored.task())
    heading, _, *classes = lines()
    assert heading == ["class", "f3", "logits"]
    assert [line[0] for line in classes] == ["all classes", *"0123456789"]
    expected = [f"{100 * chance:.0f}" for chance in chances[label == 3].mean(dim=0).tolist()]
    assert classes[4][1:] == expected
    _, _, mean, *images = lines("--class", "3", "--limit", "2")
    assert mean == ["mean of 104", *expected]
    assert [line[0] for line in images] == ["validation image 3", "validation image 13"]
    monkeypatch.setattr("utils.inspect_gates.validation_chances", lambda *_: (label, 0 * label, chances))
    with pytest.raises(UserError, match="no validation image is of class '3'"):
        main([str(trained_run), "--class", "3"])


def test_images_of_a_class_are_called_by_their_files(restored):
    source = restored.source
    files = Files([f"folder/{k}.png" for k in range(len(source.val))], source.val.labels.tolist())
    renamed = replace(restored, source=replace(source, val=files))
    vars(renamed)["val"] = restored.val
    table = of_class(renamed, restored.task(), "3", limit=2)
    assert table.iloc[1:, 0].tolist() == ["folder/3.png", "folder/13.png"]
    with pytest.raises(UserError, match="no class 'cat'"):
        of_class(restored, restored.task(), "cat", limit=2)


def test_image_files_have_a_line_each(trained_run, tmp_path, capsys):
    Image.new("RGB", (50, 40), "white").save(tmp_path / "white.png")
    assert main([str(trained_run), str(tmp_path / "white.png"), "training.device=cpu"]) == 0
    assert str(tmp_path / "white.png") in capsys.readouterr().out


def test_a_run_without_a_policy_is_a_one_line_error(trained_run):
    with pytest.raises(UserError, match="trained alone; it has no spots and no policy"):
        main([str(trained_run.parents[1] / "resnet8")])
    with pytest.raises(UserError, match="a fixed run, which has no policy"):
        main([str(trained_run), "kd.selection=fixed"])
