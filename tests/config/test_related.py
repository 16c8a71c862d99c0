"""Which run trains a student's teacher, and which command is suggested after a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from utils.config import Config, find_config
from utils.config.changes import differences
from utils.config.related import next_command, own_command, teacher_run
from utils.errors import UserError
from utils.grid.plan import plan

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = "[[conv1, bn1, relu, maxpool], [layer1], [layer2], [layer3], [layer4], [avgpool, flatten], [fc]]"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def student(*overrides: str, dataset="digits", seed=7, teacher="resnet14", student="resnet8", distiller="at") -> Config:
    return find_config(dataset, seed, teacher=teacher, student=student, distiller=distiller).load(overrides)


def single(*overrides: str, dataset="digits", seed=7, model="resnet14") -> Config:
    return find_config(dataset, seed, model=model).load(overrides)


class TestTeacher:
    @pytest.mark.parametrize(
        "word",
        [
            "dataset.root=elsewhere",
            "dataset.img_h=16",
            "dataset.mean=[0.1, 0.2, 0.3]",
            "dataset.label=mine",
            "run.root=a folder",
            "training.device=cpu",
            "training.precision=bf16",
            "training.cuda_graph=false",
            "training.channels_last=true",
            "training.deterministic=true",
            "training.seed=11",
        ],
    )
    def test_shares_the_data_the_place_and_the_machine_with_its_student(self, word):
        config = student(word)
        section, key = word.partition("=")[0].split(".")
        shared = getattr(getattr(teacher_run(config).config, section), key)
        assert shared == getattr(getattr(config, section), key)
        assert shared != getattr(getattr(teacher_run(student()).config, section), key)

    @pytest.mark.parametrize("word", ["training.epochs=3", "training.lr=0.001", "training.batch_size=5"])
    def test_is_trained_by_its_own_rules(self, word):
        assert teacher_run(student(word)).config == teacher_run(student()).config

    def test_is_built_as_its_student_builds_it(self):
        words = (f"kd.teacher.stages={STAGES}", "kd.teacher.kwargs={norm: batch, depth: 3}", "kd.teacher.label=deep")
        config = student(*words)
        assert teacher_run(config).config.model.model_dump() == config.kd.teacher.model_dump()

    def test_is_trained_from_scratch_whatever_its_student_starts_from(self):
        config = student("kd.student.checkpoint=weights.pth", "kd.student.new_head=true")
        assert teacher_run(config).config.model.checkpoint is None

    def test_has_words_of_its_own_that_win(self):
        run = teacher_run(student(), ["training.epochs=3", "training.precision=bf16"])
        assert (run.config.training.epochs, run.config.training.precision) == (3, "bf16")
        assert run.arguments[:6] == ("--dataset", "digits", "--seed", "7", "--model", "resnet14")
        assert run.arguments[-2:] == ("training.epochs=3", "training.precision=bf16")

    @pytest.mark.parametrize(
        "word", ["run.root=x", "dataset.label=other", "training.seed=1", "model.label=y", "model.name=resnet20"]
    )
    def test_must_lie_where_its_student_looks_for_it(self, word):
        with pytest.raises(UserError, match="the student looks for it in run/digits/7/resnet14; name, seed,"):
            teacher_run(student(), [word])

    def test_is_the_same_for_the_grid(self):
        pairs, keys = ["resnet14-resnet8"], ["dataset.img_h=16", "training.epochs=4", "training.cuda_graph=false"]
        job, run = plan("digits", ["adaptive"], ["at"], pairs, [7], keys, ["training.lr=0.02"])
        expected = teacher_run(run.config, ["training.lr=0.02"])
        assert (job.config, job.arguments) == (expected.config, expected.arguments)


def typed(command: str) -> tuple[dict[str, str], str, list[str]]:
    """Variables, script and arguments of a command, as a shell understands them."""
    words = shlex.split(command)
    script = words.index("sh") + 1
    return dict(word.split("=", 1) for word in words[: script - 1]), words[script], words[script + 1 :]


def run_by(command: str) -> Config:
    """The config that a command for train.sh or train_anti.sh makes."""
    variables, script, words = typed(command)
    names = {"teacher": variables["net1"], "student": variables.get("net2", "resnet8")}
    composed = find_config(variables["dataset"], int(variables["seed"]), distiller=variables["distiller"], **names)
    return composed.load([*words, *(["kd.selection=anti"] if script == "train_anti.sh" else [])])


class TestNextCommand:
    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("dataset.root=my pictures/it's", "run.root=$HOME/run"),
            ("kd.teacher.checkpoint=weights/the teacher.pth", "training.epochs=3"),
            (f"kd.teacher.stages={STAGES}", "kd.student.kwargs={width: 0.5, name: null}", "kd.student.label=half"),
            ("training.lr=0.01", "training.lr_decay_epochs=[1, 2]", "kd_loss.spots=[[1, 1]]", "training.lr_agent=0.3"),
            ("dataset.label=mine", "kd_loss.options={power: 2}", "kd.loss_weights.other_kd=5", "training.device=cpu"),
            ("dataset.mean=[0.1, 0.2, 0.3]", "dataset.img_h=16", "kd_loss.homo=false", "pretrain.epochs=2"),
        ],
    )
    @pytest.mark.parametrize(("selection", "then"), [("adaptive", "anti"), ("anti", "fixed"), ("fixed", "anti")])
    def test_pasted_repeats_the_run_under_another_selection(self, words, selection, then):
        config = student(*words, f"kd.selection={selection}")
        expected = student(*words, f"kd.selection={then}")
        assert run_by(next_command(config)) == expected

    @pytest.mark.parametrize("selection", ["adaptive", "anti", "fixed", "random"])
    def test_of_a_run_itself_repeats_it(self, selection):
        config = student(f"kd.selection={selection}", "training.epochs=3", "dataset.root=my pictures")
        assert run_by(own_command(config)) == config

    def test_of_a_network_alone_repeats_it(self):
        config = single("training.epochs=3", "model.label=own")
        variables, script, words = typed(own_command(config))
        assert script == "train_single.sh"
        assert find_config("digits", 7, model=variables["model"]).load(words) == config

    def test_is_short_where_nothing_was_changed(self):
        plain = "dataset=digits seed=7 net1=resnet14 net2=resnet8 distiller=at sh"
        assert next_command(student()) == f"{plain} train_anti.sh"
        assert next_command(student("kd.selection=anti")) == f"{plain} train.sh kd.selection=fixed"
        assert next_command(single()) == "dataset=digits seed=7 net1=resnet14 distiller=at sh train.sh"

    def test_says_no_key_that_follows_another_one(self):
        command = next_command(student("training.lr=0.01", "dataset.label=mine"))
        assert typed(command)[2] == ["dataset.label=mine", "training.lr=0.01"]

    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("dataset.root=my pictures", "run.root=it's here", "training.epochs=2", "training.lr=0.1"),
            (f"model.stages={STAGES}", "model.kwargs={a: 1}", "model.label=own", "training.precision=bf16"),
        ],
    )
    def test_after_a_teacher_finds_it_again(self, words):
        config = single(*words)
        following = run_by(next_command(config))
        assert following.teacher_checkpoint == config.run_dir / "ckpt/best.pth"
        assert teacher_run(following).config.model == config.model
        assert following.dataset == config.dataset
        assert following.training.precision == config.training.precision

    def test_of_a_published_file_that_was_named_by_path_is_as_short(self):
        file = "configs/cifar-100/seed-1029/at/vgg13-vgg8.yml"
        config = Config.from_dict(find_config("cifar-100", 1029, teacher="vgg13", student="vgg8", distiller="at").data)
        assert Path(file).exists()
        assert next_command(config).endswith("distiller=at sh train_anti.sh")

    def test_of_data_that_the_launchers_do_not_know_is_none(self, tmp_path, monkeypatch):
        config = student()
        monkeypatch.chdir(tmp_path)
        assert next_command(config) is None

    def test_of_a_file_of_ones_own_says_all_that_is_in_it(self, tmp_path):
        text = """
        dataset: {name: imagefolder, label: pets, root: pets, img_h: 40}
        training: {epochs: 3, seed: 5}
        kd: {teacher: {name: resnet14, checkpoint: t.pth}, student: {name: resnet8}}
        kd_loss: {name: sp}
        """
        config = Config.from_dict(yaml.safe_load(text))
        following = run_by(next_command(config))
        assert differences(config.to_dict(), following.to_dict()) == {"kd.selection": ("adaptive", "anti")}
