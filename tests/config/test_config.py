"""What a config amounts to: defaults, spellings, layers, folders, round trips."""

import functools
import logging
from pathlib import Path

import pytest
import yaml
from config_texts import PAIR, PUBLISHED, SINGLE, load, write
from pydantic import ValidationError
from refusals import refusal

from datasets import DATASETS
from distillers import DISTILLERS
from distillers.registry import LOGIT_LOSSES, POLICIES
from utils.config import Config, load_config
from utils.config.__main__ import key_table, main
from utils.config.errors import all_fields
from utils.config.yaml_text import dump_yaml
from utils.errors import UserError
from utils.files import warn_once
from utils.registry import names_in_source


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What a config amounts to


def test_a_published_file_of_a_network_alone_loads_unchanged():
    weight = "kd: {loss_weights: {classify_weight: 1.0}}\n"
    assert load(SINGLE + weight) == load(SINGLE)
    for more in (
        weight.replace("1.0", "2"),
        weight.replace("}}", "}, selection: fixed}"),
        f"{weight}kd_loss: {{name: at}}",
    ):
        with pytest.raises(UserError):
            load(SINGLE + more)


def test_the_share_of_memory_that_published_files_occupy_is_accepted():
    config = load(PUBLISHED.replace("gpu_preserve: False", "gpu_preserve: 0.75"))
    assert load(yaml.safe_dump(config.to_dict())) == config


def test_the_defaults_are_those_of_the_published_experiments():
    config = load(PAIR)
    spelt_out = load(PUBLISHED)
    others = {"num_workers": True, "save_ep_freq": True, "optimizer": {"lr"}}
    assert config.training.model_dump(exclude=others) == spelt_out.training.model_dump(exclude=others)
    assert config.pretrain == spelt_out.pretrain
    assert (config.kd_loss.KD_T, config.kd_loss.feat_dim) == (4, 128)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        # Names forgive case, dash and underscore.
        ("dataset.name=Cifar_100", "dataset.name", "cifar-100"),
        ("dataset.name=TinyImageNet", "dataset.name", "tiny-imagenet"),
        ("kd_loss.name=FitNet", "kd_loss.name", "fitnet"),
        ("training.optimizer.name=adamw", "training.optimizer.name", "AdamW"),
        # Rates, drops and temperatures follow others unless they are given.
        ("training.lr=null", "training.lr", 0.05),
        ("training.optimizer.lr=0.2", "training.lr", 0.2),
        ("training.optimizer.lr=0.2 training.lr=0.01", "training.lr", 0.01),
        ("training.optimizer.lr=0.2", "training.lr_agent", 0.1),
        ("training.lr=0.01 training.lr_agent=0.3", "training.lr_agent", 0.3),
        ("training.lr_decay_epochs=[3,5]", "training.lr_agent_decay_epochs", (3, 5)),
        ("training.lr_agent_decay_epochs=[7]", "training.lr_agent_decay_epochs", (7,)),
        ("kd_loss.T=2", "kd_loss.KD_T", 2.0),
        ("kd_loss.T=2 kd_loss.KD_T=6", "kd_loss.KD_T", 6.0),
        # Epochs can be a list, one number, or words with commas; numbers are written in every usual way.
        ("training.lr_decay_epochs=3,5", "training.lr_decay_epochs", (3, 5)),
        ("training.lr_decay_epochs=3", "training.lr_decay_epochs", (3,)),
        ("training.lr_decay_epochs=[]", "training.lr_decay_epochs", ()),
        ("training.lr=5e-4", "training.lr", 5e-4),
        ("training.lr=.5", "training.lr", 0.5),
        ("training.lr=2.", "training.lr", 2.0),
        # Options are whatever a constructor takes, and spots are pairs.
        ("kd_loss.options={k:[1]} kd_loss.options.deep={a:0.5}", "kd_loss.options", {"k": [1], "deep": {"a": 0.5}}),
        ("kd.student.kwargs.width=2", "kd.student.kwargs", {"width": 2}),
        ("kd_loss.spots=[[1,2],[-2,-2]]", "kd_loss.spots", [(1, 2), (-2, -2)]),
        # A later word wins, and a word wins over the file.
        ("training.epochs=1 training.epochs=2", "training.epochs", 2),
        ("kd.student={checkpoint:s.pth}", "kd.student.name", "vgg8"),
    ],
)
def test_words_amount_to_values(words, key, value):
    words = [word.replace(":", ": ") for word in words.split()]
    found = functools.reduce(getattr, key.split("."), load(PAIR, *words))
    assert (found, type(found)) == (value, type(value))


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        load(SINGLE).training.epochs = 3


@pytest.mark.parametrize("text", [SINGLE, PAIR, PUBLISHED])
def test_a_config_survives_the_journey_through_plain_dicts_and_yaml(text):
    config = load(text, "training.lr=1e-5", "dataset.mean=[0.1,0.2,0.3]", "training.cuda_graph=true")
    assert config.training.cuda_graph is True
    assert Config.from_dict(config.to_dict()) == config
    assert load(yaml.safe_dump(config.to_dict())) == config


# Where runs go


def test_a_single_model_and_a_pair_have_their_folders_under_run():
    assert load(SINGLE).run_dir == Path("run/digits/1029/vgg8")
    words = ("kd.selection=anti", "run.root=/r", "dataset.label=mine", "training.seed=7")
    assert load(PAIR, *words).run_dir == Path("/r/mine/7/anti-at/vgg13-vgg8")


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        ("name: vgg8", "vgg8"),
        ("name: MobileNetV2, kwargs: {width: 0.5}", "MobileNetV2-width-0.5"),
        ("name: torchvision.models.resnet18", "torchvision.models.resnet18"),
        ("name: a.Net, kwargs: {width: 2, depth: 3}", "a.Net-depth-3-width-2"),
        ("name: a.Net, kwargs: {bias: true, act: null}", "a.Net-act-null-bias-true"),
        ("name: a.Net, kwargs: {blocks: [3, 4]}", "a.Net-blocks-3_4-3527c7"),
        ("name: a.Net, kwargs: {file: ../x..}", "a.Net-file-x-ae5d4c"),
        (f"name: a.{'n' * 200}", f"a.{'n' * 98}-83ad45"),
        ("name: a.Net, label: mine, kwargs: {width: 2}", "mine"),
    ],
)
def test_a_network_has_a_name_of_its_own_in_folders_unless_the_user_gives_it_a_label(keys, title):
    config = load(PAIR, f"kd.teacher={{{keys}}}")
    assert config.kd.teacher.title == title
    assert config.run_dir == Path(f"run/digits/1029/adaptive-at/{title}-vgg8")
    assert config.teacher_checkpoint == Path(f"run/digits/1029/{title}/ckpt/best.pth")
    assert load(f"dataset: {{name: digits}}\nmodel: {{{keys}}}\n").run_dir == Path(f"run/digits/1029/{title}")
    assert load(PAIR, f"kd.student.label={title}").kd.student.title == title


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("run.root=~/runs", "dataset.root=~/data", "kd.teacher.checkpoint=~/t.pth", "kd.student.checkpoint=~/s.pth")
    config = load(PAIR, *keys)
    assert config.run_dir == Path("/home/me/runs/digits/1029/adaptive-at/vgg13-vgg8")
    assert config.teacher_checkpoint == Path("/home/me/t.pth")
    assert (config.dataset.root, config.kd.student.checkpoint) == ("/home/me/data", "/home/me/s.pth")


@pytest.mark.parametrize("label", ["7e12", "on", "5", "null", "0x1F", "2020-01-01"])
def test_a_word_that_looks_like_a_number_is_still_a_word_when_it_is_read_again(label):
    config = load(PAIR, f"kd.student.label='{label}'", f"kd.student.kwargs.revision='{label}'")
    assert load(dump_yaml(config.to_dict())) == config
    assert yaml.safe_load(dump_yaml({"word": label})) == {"word": label}


# Layers


def test_a_file_wins_over_its_bases_and_a_later_base_over_an_earlier_one():
    write("a.yml", "training: {epochs: 1, batch_size: 1, lr: 1}\n")
    write("sub/b.yml", "base: ../a.yml\ntraining: {epochs: 2, batch_size: 2}\n")
    write("c.yml", "training: {epochs: 3}\n")
    training = load("base: [sub/b.yml, c.yml]\ntraining: {seed: 4}\n" + SINGLE).training
    assert (training.lr, training.batch_size, training.epochs, training.seed) == (1, 2, 3, 4)


def test_a_base_may_be_reached_on_two_ways_and_an_empty_heading_changes_nothing():
    write("a.yml", "training: {epochs: 1}\n")
    write("b.yml", "base: a.yml\ntraining: {epochs: 2}\n")
    write("c.yml", "base: a.yml\ntraining: {batch_size: 3}\n")
    assert load("base: [b.yml, c.yml]\ntraining:\n" + SINGLE).training.epochs == 1
    assert load("training:\nvalidation:\n" + SINGLE).training.epochs == 240


def test_errors_name_the_file_in_which_the_key_stands():
    write("sub/a.yml", "training: {epochs: 0, batch_size: 1}\n")
    path = write("x.yml", "base: sub/a.yml\ntraining: {batch_size: 2}\n" + SINGLE)
    assert refusal(load_config, path).startswith("sub/a.yml: training.epochs: found 0")
    assert refusal(load_config, path, ["training.epochs=-1"]).startswith("command line: training.epochs: found -1")
    path.write_text("base: sub/a.yml\ntraining: {batch_size: 0, epochs: 1}\n" + SINGLE)
    assert refusal(load_config, path).startswith("x.yml: training.batch_size: found 0")


SHORT = SINGLE + "training: {epochs: 20, lr_decay_epochs: [14, 18]}\n"
BOTH = SINGLE + "training: {epochs: 20, lr_decay_epochs: [14, 18], lr_agent_decay_epochs: [10]}\n"


@pytest.mark.parametrize(
    ("text", "words", "drops", "of_agent"),
    [
        (SHORT, ["training.epochs=30"], (21, 27), (21, 27)),
        (BOTH, ["training.epochs=30"], (21, 27), (15,)),
        (SINGLE, ["training.epochs=24"], (15, 18, 21), (15, 18, 21)),
        (SHORT, ["training.epochs=1"], (1,), (1,)),
        (SHORT, ["training.epochs=20"], (14, 18), (14, 18)),
        (SHORT, ["training={epochs: 40}"], (28, 36), (28, 36)),
        (SHORT, ["training.epochs=30", "training.lr_decay_epochs=[5]"], (5,), (5,)),
        (SHORT, ["training={epochs: 30, lr_decay_epochs: [5], lr_agent_decay_epochs: null}"], (5,), (5,)),
        (BOTH, ["training.epochs=30", "training.lr_decay_epochs=[5]"], (5,), (15,)),
        (SHORT, ["training.epochs=30", "training.schedule=cosine"], (14, 18), (14, 18)),
        (SHORT, ["training.lr=0.1"], (14, 18), (14, 18)),
    ],
)
def test_drops_of_a_file_or_a_default_are_scaled_and_those_of_the_command_line_are_not(text, words, drops, of_agent):
    training = load(text, *words).training
    assert (training.lr_decay_epochs, training.lr_agent_decay_epochs) == (drops, of_agent)


def test_one_line_says_that_drops_are_scaled(caplog):
    caplog.set_level(logging.INFO)
    warn_once.cache_clear()  # another test may have asked for the same
    for words in ([], ["training.epochs=60"], ["training.epochs=60"]):
        load(SHORT, *words)
    assert caplog.messages == ["x.yml: training.lr_decay_epochs: [42, 54], scaled from [14, 18] of 20 epochs to 60"]


# The reference


def test_every_key_is_described_in_the_table():
    table = key_table().splitlines()
    assert all(field.description for _, field in all_fields(Config))
    assert len(table) == 2 + len(list(all_fields(Config)))
    assert "training.epochs                         240              epochs in all" in table
    (line,) = (line for line in table if line.startswith("training.cuda_graph "))
    assert line.endswith(" [auto, true, false]")


def test_the_table_lists_every_data_set_distiller_and_loss_at_the_logits_that_is_registered():
    table = key_table().splitlines()
    registries = {
        "dataset.name": DATASETS,
        "kd_loss.name": DISTILLERS,
        "kd_loss.logits": LOGIT_LOSSES,
        "kd.policy": POLICIES,
    }
    for key, registry in registries.items():
        (line,) = (line for line in table if line.startswith(f"{key} "))
        names = line.rpartition("  ")[2].partition(", or your")[0].rpartition(": ")[2].split(", ")
        assert sorted(names) == sorted(registry)


def test_names_in_the_source_pass_over_what_is_no_literal_and_what_an_editor_leaves(tmp_path, monkeypatch):
    package = tmp_path / "made_up_losses"
    package.mkdir()
    (package / "one.py").write_text('@register_loss("one", "uno")\nNAME = "two"\n@register_loss(NAME)\n')
    (package / "__init__.py").touch()
    (package / ".#one.py").symlink_to("me@here.1:2")  # what Emacs makes while a file has unsaved changes
    monkeypatch.syspath_prepend(tmp_path)
    assert names_in_source("made_up_losses") == ("one", "uno")


def test_the_module_shows_a_file_that_loads_again(capsys):
    path = write("x.yml", PAIR)
    main([str(path), "training.epochs=3"])
    assert load(capsys.readouterr().out) == load_config(path, ["training.epochs=3"])


@pytest.mark.parametrize(
    "text", ["dataset: {name: digits}\n", "kd_loss: {name: at}\nkd: {loss_weights: {other_kd: 1}}\n"]
)
def test_the_module_shows_a_base_file_and_checks_it(text, capsys):
    path = write("b.yml", f"base: a.yml\n{text}")
    write("a.yml", "training: {epochs: 1}\n")
    main([str(path), "training.lr=1"])
    assert yaml.safe_load(capsys.readouterr().out) == {**yaml.safe_load(text), "training": {"epochs": 1, "lr": 1}}
    with pytest.raises(UserError, match=r"command line: training\.warmup_epochs: found 1: must be less"):
        main([str(path), "training.warmup_epochs=1"])
