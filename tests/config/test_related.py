"""Which run trains a student's teacher, what a run remembers, and which command is suggested after it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from utils.cli import main_distill, main_single
from utils.config import Config, find_config
from utils.config.related import Command, next_command, remembered, teacher_run
from utils.errors import UserError
from utils.grid.plan import plan
from utils.run_folder.layout import Layout

REPOSITORY = Path(__file__).resolve().parents[2]
SINGLE = "configs/digits/seed-1029/single/vgg8.yml"
STAGES = "[[conv1, bn1, relu, maxpool], [layer1], [layer2], [layer3], [layer4], [avgpool, flatten], [fc]]"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def student(*overrides: str, distiller="at") -> Config:
    return find_config("digits", 7, teacher="resnet14", student="resnet8", distiller=distiller).load(overrides)


class TestTeacher:
    @pytest.mark.parametrize(
        "word",
        [
            "dataset.root=elsewhere",
            "dataset.label=mine",
            "run.root=a folder",
            "run.root='5'",
            "training.precision=bf16",
            "training.seed=11",
        ],
    )
    def test_shares_data_place_and_machine_with_its_student(self, word):
        config = student(word)
        section, key = word.partition("=")[0].split(".")
        shared = getattr(getattr(teacher_run(config).config, section), key)
        assert shared == getattr(getattr(config, section), key)
        assert shared != getattr(getattr(teacher_run(student()).config, section), key)

    def test_is_trained_by_its_own_rules_from_scratch(self):
        other = ("training.epochs=3", "training.lr=0.001", "kd.student.checkpoint=w.pth", "kd.student.new_head=true")
        assert teacher_run(student(*other)).config == teacher_run(student()).config

    def test_is_built_as_its_student_builds_it(self):
        words = (f"kd.teacher.stages={STAGES}", "kd.teacher.kwargs={norm: batch, depth: 3}", "kd.teacher.label=deep")
        config = student(*words)
        assert teacher_run(config).config.model.model_dump() == config.kd.teacher.model_dump()

    def test_sees_the_images_as_its_student_does_also_where_a_file_says_otherwise(self):
        words = ("dataset.img_h=96", "dataset.img_w=null")
        config = find_config("imagefolder", 7, teacher="resnet14", student="resnet8", distiller="at").load(words)
        found = teacher_run(config).config.dataset
        assert (found.img_h, found.img_w) == (config.dataset.img_h, config.dataset.img_w) == (96, None)

    def test_has_words_of_its_own_that_win(self):
        run = teacher_run(student(), ["training.epochs=3", "training.precision=bf16"])
        assert (run.config.training.epochs, run.config.training.precision) == (3, "bf16")
        assert run.command.arguments[:6] == ("--dataset", "digits", "--seed", "7", "--model", "resnet14")
        assert run.command.arguments[-2:] == ("training.epochs=3", "training.precision=bf16")

    @pytest.mark.parametrize("word", ["run.root=x", "model.label=y", "model.name=resnet20"])
    def test_must_lie_where_its_student_looks_for_it(self, word):
        with pytest.raises(UserError, match="the student looks for it in run/digits/7/resnet14"):
            teacher_run(student(), [word])

    def test_is_the_same_for_the_grid(self):
        pairs, keys = ["resnet14-resnet8"], ["dataset.img_h=16", "training.epochs=4", "training.cuda_graph=false"]
        job, run = plan("digits", ["adaptive"], ["at"], pairs, [7], keys, ["training.lr=0.02"])
        expected = teacher_run(run.config, ["training.lr=0.02"])
        assert (job.config, job.arguments) == (expected.config, expected.command.arguments)


@pytest.fixture
def started(monkeypatch):
    """Run an entry point up to the training; the config, and the command that the run remembers."""

    def start(main, *words: str, **options) -> tuple[Config, Command]:
        calls = []
        monkeypatch.setattr("utils.training.run.train", lambda config, command, **more: calls.append((config, command)))
        main(arguments=words, **options)
        return calls[0]

    return start


def repeated(started, command: Command) -> Config:
    """The config of a remembered command, as a shell and a launcher understand it."""
    words = shlex.split(str(command))
    behind = words.index("sh") + 1
    given = dict(word.split("=", 1) for word in words[: behind - 1])
    options = [part for name, value in given.items() if name != "nproc" for part in (f"--{name}", value)]
    script, main = words[behind], main_single if words[behind] == "train_single.sh" else main_distill
    selection = {"selection": "anti"} if script == "train_anti.sh" else {}
    return started(main, *options, *words[behind + 1 :], **selection)[0]


class TestCommand:
    @pytest.mark.parametrize(
        ("main", "selection", "words"),
        [
            (main_single, {}, ["--dataset", "digits", "--model", "resnet8", "training.epochs=3"]),
            (main_distill, {}, ["--seed", "3", "dataset.root=my pictures/it's", "run.root=$HOME/run"]),
            (main_distill, {"selection": "anti"}, ["--dataset", "digits", "kd.student.kwargs={width: 0.5}"]),
            (main_distill, {}, ["--config", "configs/digits/seed-1029/at/vgg13-vgg8.yml", "training.seed=2"]),
        ],
    )
    def test_that_is_remembered_repeats_the_run(self, started, main, selection, words):
        config, command = started(main, *words, **selection)
        assert repeated(started, command) == config

    def test_is_what_was_typed(self, started, monkeypatch):
        monkeypatch.setenv("nproc", "2")
        words = ["--net1", "vgg13", "--resume", "training.epochs=3", "--teacher-arg", "training.epochs=4"]
        _, command = started(main_distill, *words)
        expected = "net1=vgg13 nproc=2 sh train.sh --teacher-arg training.epochs=4 training.epochs=3"
        assert remembered(student(), command) == expected

    def test_of_the_anti_launcher_has_the_selection_that_is_typed(self, started):
        typed = started(main_distill, "--dataset", "digits", "kd.selection=shuffled", selection="anti")[0]
        usual = started(main_distill, "--dataset", "digits", selection="anti")[0]
        assert (typed.kd.selection, usual.kd.selection) == ("shuffled", "anti")

    def test_of_a_run_from_python_is_its_config_file(self):
        file = "run/digits/7/adaptive-at/resnet14-resnet8/config.yml"
        assert remembered(student()) == f"python train.py --config {file}"
        assert next_command(student(), None) == "python -m utils.report run"


class TestNext:
    @pytest.mark.parametrize(
        ("selection", "other"), [("adaptive", "fixed"), ("random", "fixed"), ("fixed", "adaptive")]
    )
    def test_after_a_student_is_its_counterpart_then_the_report(self, started, tmp_path, selection, other):
        words = ("--dataset", "digits", "--net1", "resnet14", "--net2", "resnet8", f"run.root={tmp_path}")
        words += ("training.epochs=3", "dataset.root=my pictures")
        config, command = started(main_distill, *words, f"kd.selection={selection}")
        following = repeated(started, next_command(config, command))
        assert following == started(main_distill, *words, f"kd.selection={other}")[0]
        assert next_command(config, command).count("kd.selection=") == 1
        finished = Layout(following.run_dir)
        finished.path.mkdir(parents=True)
        finished.result.write_text("{}")
        assert next_command(config, command) == f"python -m utils.report {tmp_path}"

    @pytest.mark.parametrize(("model", "role"), [("resnet20", "teacher"), ("resnet8", "student")])
    def test_after_a_network_alone_is_a_published_pair_with_it(self, started, model, role):
        own = ("training.seed=5", "training.precision=bf16", "run.root=a folder", "training.epochs=3")
        built = ("model.label=mine", "model.kwargs={width: 2}", "model.checkpoint=w.pth", "model.new_head=true")
        config, command = started(main_single, "--dataset", "digits", "--model", model, *own, *built)
        following = repeated(started, next_command(config, command))
        assert (following.kd.teacher.name, following.kd.student.name) == ("resnet20", "resnet8")
        network = getattr(following.kd, role)
        assert (network.label, network.kwargs, network.checkpoint) == ("mine", {"width": 2}, None)
        assert (following.dataset, following.run) == (config.dataset, config.run)
        assert (following.training.seed, following.training.precision) == (5, "bf16")
        assert following.training.epochs != 3
        assert role == "student" or following.teacher_checkpoint == config.run_dir / "ckpt/best.pth"

    @pytest.mark.parametrize(
        ("main", "words", "options", "expected"),
        [
            (main_distill, [], {"selection": "anti"}, "python -m utils.report run"),
            (main_single, ["--model", "vgg8"], {}, "net1=vgg13 net2=vgg8 sh train.sh"),
            (main_single, ["--model", "resnet14"], {}, "python -m utils.report run"),
            (main_single, ["--config", SINGLE], {}, "python -m utils.report run"),
        ],
    )
    def test_else_is_a_pair_of_one_family_or_the_report(self, started, main, words, options, expected):
        assert next_command(*started(main, *words, **options)) == expected
