"""Whatever is wrong with a config is told in one line: the file, the key, what was found and what would do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from config_texts import PAIR, SINGLE, load, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal

from utils.config import Config, load_config
from utils.config.errors import all_fields
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# At least one of each type and of each limit; of types that many keys share, one of each way to be wrong.
IMPOSSIBLE = [
    *("training.batch_size=" + value for value in ("0", "64.0", "'64'", "true", "", "3000000000")),
    *("training.lr=" + value for value in ("0", "fast", "true", "'nan'", "1e999", "1e300")),
    *("training.lr_decay_epochs=" + value for value in ("[5,3]", "[5,5]", "{}", "true")),
    *("training.class_weights=" + value for value in ("[1,0]", "[]", "fast")),
    *("training.device=" + value for value in ("gpu", "cpu:0", "cuda:200")),
    *("kd.student.name=" + value for value in ("a/b", "a.", "timm/a/b")),
    *("training.optimizer." + word for word in ("weight_decay=1e39", "weight_decay=-1", "momentum=1", "name=LBFGS")),
    *("training." + word for word in ("num_workers=100000", "lr_decay_rate=2", "schedule=linear", "precision=fp16")),
    *("training." + word for word in ("warmup_epochs=240", "init_epoch=240", "init_epoch=-1", "cuda_graph=on")),
    *("training." + word for word in ("ema_decay=1", "mixup=-1", "channels_last=last", "label_smoothing=1")),
    *("dataset." + word for word in ("root=3", "root=''", "label=../up", "num_classes=1", 'root="\\uD800"')),
    *(
        "dataset." + word
        for word in ("mean=[1,1]", "mean=[1,1,1,1]", "std=[58,57,57]", "image_range=[5,1]", "val_split=1")
    ),
    *("kd." + word for word in ("selection=best", "gate_temperature=0", "routing_share=1.5", "warmup_epochs=-1")),
    *("kd." + word for word in ("student.label=a/b", 'teacher.checkpoint="\\0"', "loss_weights.classify_weight=0")),
    *("kd_loss." + word for word in ("KD_T=-4", "options=3", "logits=''", "logits_options=3", "homo=yes")),
    *("pretrain." + word for word in ("optimizer.name=AdamW", "epochs=0")),
]


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_an_impossible_value_is_told_with_its_key_and_source(override):
    assert refusal(load, PAIR, override).startswith(f"command line: {override.partition('=')[0]}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.lr_decay_epochs=[5,3]",
            "training.lr_decay_epochs: found [5, 3]: each must be larger than the one before",
        ),
        ("kd_loss.spots=[[1,2,3]]", "kd_loss.spots[0]: found [1, 2, 3]: Tuple should have at most 2 items"),
        ("training.epochs.x=3", "training.epochs: Input should be a valid integer"),
        ("training={nesterov: true}", "unknown key training.nesterov: did you mean 'training.optimizer.nesterov'?"),
        ("training.optimizer={name: AdamW, nesterov: true}", "training.optimizer.nesterov: found True: must be false"),
        ("kd_loss.name=fitnt", "kd_loss.name: unknown distiller 'fitnt': did you mean 'fitnet'? known are "),
        ("dataset.name=cifar-101", "dataset.name: unknown dataset 'cifar-101': did you mean 'cifar-10"),
        ("training.epoch=3", "unknown key training.epoch: did you mean 'training.epochs'?"),
        ("batch_size=3", "unknown key batch_size: did you mean 'training.batch_size'?"),
        ("=3", "found '=3', must be key=value"),
        ("a=*x", "a=*x: line 1, column 1: aliases are not read here"),
    ],
)
def test_the_line_says_what_was_found_and_what_would_do(override, message):
    assert refusal(load, PAIR, override).startswith(f"command line: {message}")


def test_a_word_that_a_key_of_the_file_overrules_is_refused():
    line = "command line: training.optimizer.lr has no effect beside training.lr in x.yml; set that"
    assert refusal(load, PAIR + "training: {lr: 0.1}\n", "training.optimizer.lr=0.2") == line


@pytest.mark.parametrize("word", ["xyzzy=3", "<<={a: 1}", f"{'k' * 99}=3", f"a={'9' * 5000}", "a=" + "[" * 600])
def test_a_strange_word_is_told_in_a_short_line(word):
    assert len(refusal(load, SINGLE, word)) < 260


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no `key: value` lines such as dataset: and model:"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' stands here a second time"),
        ("a: &x 1\nb: *x\n", "line 2, column 4: aliases are not read here; share keys between files with `base:`"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: could not determine a constructor for the tag"),
        ("a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("? [a]\n: 2\n", "line 1, column 3: found unhashable key"),
        (SINGLE + "training: {1: 2}\n", "training[1]: found 1: Keys should be strings"),
        (b"a: caf\xe9\n", "not YAML: unacceptable character"),
        ("base: [a.yml, {b: c}]\n", "base: found ['a.yml', {'b': 'c'}], must be a path or a list of paths"),
        ("base: y.yml\n", "y.yml: no such file: did you mean 'x.yml'?"),
        ("base: .\n", ".: is a folder, a link, a pipe or a device, expected a file"),
        ("base: x.yml\n", "base: goes in a circle (x.yml -> x.yml)"),
        ("model: {name: vgg8}\n", "dataset: Field required"),
        ("dataset: {name: digits}\n", "found neither of model and kd, must be one"),
        (PAIR + "model: {name: vgg8}\n", "found both of model and kd, must be one"),
        (SINGLE + "kd_loss: {name: at}\n", "kd_loss without kd; the two go together"),
        (PAIR.replace("kd_loss: {name: at}\n", ""), "kd without kd_loss; the two go together"),
        (
            PAIR.replace("{name: vgg13}", "{name: vgg13, checkpoint: t.pth, new_head: true}"),
            "kd.teacher: found new_head beside checkpoint",
        ),
        (SINGLE + '? "a\\nb"\n: 1\n', "unknown key a\\nb"),
        # A misspelt key comes before what it causes.
        ("dataset: {name: digits}\nmodle: {}\ntraining: {lr: 0}\n", "unknown key modle: did you mean 'model'? (and 1"),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_line(content, message):
    assert refusal(load, content).startswith(f"x.yml: {message}")


def test_circles_of_bases_are_told_with_their_way():
    write("a.yml", "base: b.yml\n")
    write("b.yml", "base: a.yml\n")
    assert refusal(load_config, "a.yml") == "a.yml: b.yml: base: goes in a circle (a.yml -> b.yml -> a.yml)"
    os.link("a.yml", "c.yml")
    Path("d").symlink_to(".")
    assert "goes in a circle" in refusal(load_config, "d/../c.yml")


def test_what_is_no_file_is_told_with_the_closest_that_exists():
    write("configs/vgg8.yml", SINGLE)
    Path("x.yml").symlink_to("gone.yml")
    os.mkfifo("pipe")
    for path, end in {
        "configs/vgg9.yml": "no such file: did you mean 'configs/vgg8.yml'?",
        "config/vgg8.yml": "no such file: did you mean 'configs'?",
        "xyzzy": "no such file",
        "x.yml": "no such file",  # a link that leads nowhere is not its own correction
        "pipe": "is a folder, a link, a pipe or a device, expected a file",  # instead of waited for
        "/dev/zero": "is a folder, a link, a pipe or a device, expected a file",
        ".": "is a folder, a link, a pipe or a device, expected a file",
    }.items():
        assert refusal(load_config, path) == f"{path}: {end}"


def test_a_broken_dict_from_a_checkpoint_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^old\.pth: dataset: Field required \(and 1 more\)$"):
        Config.from_dict({"training": {"lr": "x"}}, source="old.pth")
    with pytest.raises(UserError, match=r"^checkpoint: found 3: Input should be a valid dictionary"):
        Config.from_dict(3)


# Nothing but a config or one line, whatever comes in

_keys = st.sampled_from(sorted({part for key, _ in all_fields(Config) for part in key} | {"base", "x"}))
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["digits", "vgg8", "at", "auto", "5e-4", "x.yml", 10**400]),
)
_trees = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=6), max_leaves=30
)
_quick = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def loads_or_says_why(load_it: Callable[[], Config]) -> bool:
    """Whether `load_it` gives a config or one line; any other exception comes through."""
    try:
        return isinstance(load_it(), Config)
    except UserError as error:
        return str(error).isprintable()


@_quick
@given(st.dictionaries(_keys, _trees, max_size=8))
def test_any_nested_mapping_loads_or_is_refused_in_one_line(tree):
    assert loads_or_says_why(lambda: Config.from_dict(tree))
    valid = {"dataset": {"name": "digits"}, "model": {"name": "vgg8"}}
    assert loads_or_says_why(lambda: Config.from_dict(valid | tree))


@_quick
@given(st.binary(max_size=60) | st.text(alphabet="abx:-[]{}&*!|>'\"#,?% \n\t0.e~=<"))
def test_any_text_loads_or_is_refused_in_one_line(text):
    assert loads_or_says_why(lambda: load(text))
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    assert loads_or_says_why(lambda: load(SINGLE, text))
    assert loads_or_says_why(lambda: load(SINGLE, f"model.kwargs={text}"))
