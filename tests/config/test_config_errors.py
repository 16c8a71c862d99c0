"""Whatever is wrong with a config is told in one line: the file, the key, what was found and what would do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from config_texts import PAIR, SINGLE, complaint, load, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.config import Config, load_config
from utils.config.errors import all_fields
from utils.errors import UserError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=0", "training.batch_size: found 0, must be at least 1"),
        ("training.batch_size=64.0", "training.batch_size: found 64.0, must be a whole number"),
        ("training.batch_size='64'", "training.batch_size: found '64', must be a whole number"),
        ("training.batch_size=true", "training.batch_size: found true, must be a whole number"),
        ("training.batch_size=", "training.batch_size: found nothing, must be a whole number"),
        ("training.batch_size={a: 1}", "training.batch_size: found a mapping, must be a whole number"),
        ("training.batch_size=3000000000", "training.batch_size: found 3000000000, must be less than 2147483648"),
        ("training.lr=0", "training.lr: found 0, must be more than 0"),
        ("training.lr=fast", "training.lr: found 'fast', must be a number"),
        ("training.lr=true", "training.lr: found true, must be a number"),
        ("training.lr=[1]", "training.lr: found [1], must be a number"),
        ("training.lr='nan'", "training.lr: found 'nan', must be a finite number"),
        ("training.lr=1e999", "training.lr: found inf, must be a finite number"),
        ("training.lr=1e300", "training.lr: found 1e+300, must be between -1e38 and 1e38"),
        (
            "training.optimizer.weight_decay=1e39",
            "training.optimizer.weight_decay: found 1e+39, must be between -1e38 and 1e38",
        ),
        ("training.num_workers=100000", "training.num_workers: found 100000, must be at most 1024"),
        ("training.lr_decay_rate=2", "training.lr_decay_rate: found 2, must be at most 1"),
        ("training.optimizer.momentum=1", "training.optimizer.momentum: found 1, must be less than 1"),
        ("training.optimizer.weight_decay=-1", "training.optimizer.weight_decay: found -1, must be at least 0"),
        (
            "training.optimizer.name=LBFGS",
            "training.optimizer.name: found 'LBFGS', must be 'SGD', 'AdamW', 'Adam', 'NAdam', 'RAdam', 'Adamax', "
            "'Adadelta', 'Adafactor', 'Adagrad', 'ASGD', 'RMSprop' or 'Rprop'",
        ),
        (
            "training.optimizer={name: AdamW, nesterov: true}",
            "training.optimizer.nesterov: found true, must be false unless name is SGD and momentum above 0",
        ),
        ("pretrain.optimizer.name=AdamW", "pretrain.optimizer.name: found 'AdamW', must be 'SGD'"),
        ("training.schedule=linear", "training.schedule: found 'linear', must be 'steps' or 'cosine'"),
        (
            "training.warmup_epochs=240",
            "training.warmup_epochs: found 240, must be less than training.epochs, which is 240",
        ),
        ("training.ema_decay=1", "training.ema_decay: found 1, must be less than 1"),
        (
            "training.mixup=-1",
            "training.mixup: found -1, must be at least 0",
        ),
        ("training.lr_decay_epochs=[5,3]", "training.lr_decay_epochs: found [5, 3], must increase from epoch to epoch"),
        ("training.lr_decay_epochs=[0]", "training.lr_decay_epochs[0]: found 0, must be at least 1"),
        (
            "training.lr_decay_epochs=soon",
            "training.lr_decay_epochs: found 'soon', must be a list of epochs, e.g. [150, 180, 210]",
        ),
        ("training.lr_decay_epochs={}", "training.lr_decay_epochs: found a mapping, must be a list"),
        ("training.init_epoch=240", "training.init_epoch: found 240, must be less than training.epochs, which is 240"),
        ("training.init_epoch=-1", "training.init_epoch: found -1, must be at least 0"),
        ("training.gpu_preserve=2", "training.gpu_preserve: found 2, must be true, false or a share from 0 to 1"),
        ("training.gpu_preserve=all", "training.gpu_preserve: found 'all', must be true, false or a share from 0 to 1"),
        (
            "training.gpu_preserve=.nan",
            "training.gpu_preserve: found '.nan', must be true, false or a share from 0 to 1",
        ),
        ("training.cuda_graph=on", "training.cuda_graph: found 'on', must be auto, true or false"),
        ("training.channels_last=last", "training.channels_last: found 'last', must be auto, true or false"),
        ("training.cuda_graph=1", "training.cuda_graph: found 1, must be auto, true or false"),
        ("training.precision=fp16", "training.precision: found 'fp16', must be 'fp32', 'tf32' or 'bf16'"),
        ("training.device=gpu", "training.device: found 'gpu', must be auto, cpu, cuda or cuda:N"),
        ("training.device=cpu:0", "training.device: found 'cpu:0', must be auto, cpu, cuda or cuda:N"),
        ("training.device=cuda:200", "training.device: found 'cuda:200', must be auto, cpu, cuda or cuda:N"),
        ("training=3", "training: found 3, must be a mapping of keys"),
        ("training.epochs.x=3", "training.epochs: found a mapping, must be a whole number"),
        ("dataset.root=3", "dataset.root: found 3, must be a word"),
        ("dataset.root=''", "dataset.root: found '', must be a word"),
        ("dataset.label=../up", "dataset.label: found '../up', must be letters, digits, underscores, dashes and dots"),
        ("dataset.num_classes=1", "dataset.num_classes: found 1, must be at least 2"),
        (f"dataset.num_classes={10**30}", f"dataset.num_classes: found {10**30}, must be less than 2147483648"),
        ('run.root="a\\0b"', "run.root: found 'a\\x00b', must hold no NUL"),
        ('dataset.root="\\uD800"', "dataset.root: found '\\ud800', must be a word in UTF-8"),
        ('kd.teacher.checkpoint="\\0"', "kd.teacher.checkpoint: found '\\x00', must hold no NUL"),
        ("dataset.std=[1,0,1]", "dataset.std[1]: found 0, must be more than 0"),
        ("dataset.image_range=[5,1]", "dataset.image_range: found [5, 1], must be a lower and a higher number"),
        (
            "training.class_weights=[1,0]",
            "training.class_weights: found [1, 0], must be balanced or a list with a number above 0 for each class",
        ),
        (
            "training.class_weights=fast",
            "training.class_weights: found 'fast', must be balanced or a list with a number above 0 for each class",
        ),
        ("dataset.mean=[1,1]", "dataset.mean: found [1, 1], must be a list of 3"),
        ("kd.student.name=a/b", "kd.student.name: found 'a/b', must be letters, digits, underscores, dashes and dots"),
        (
            "kd.student.label=a/b",
            "kd.student.label: found 'a/b', must be letters, digits, underscores, dashes and dots",
        ),
        ("kd.student.stages=[a]", "kd.student.stages[0]: found 'a', must be a list"),
        ("kd.student.name=a.", "kd.student.name: found 'a.', must be letters, digits, underscores, dashes and dots"),
        ("kd.selection=best", "kd.selection: found 'best', must be 'adaptive', 'anti', 'fixed' or 'random'"),
        ("kd.gate_temperature=0", "kd.gate_temperature: found 0, must be more than 0"),
        ("kd.loss_weights.classify_weight=0", "kd.loss_weights.classify_weight: found 0, must be more than 0"),
        ("kd_loss.KD_T=-4", "kd_loss.KD_T: found -4, must be more than 0"),
        ("kd_loss.spots=[[1]]", "kd_loss.spots[0]: found [1], must be a list of 2"),
        ("kd_loss.spots=[[1,2,3]]", "kd_loss.spots[0]: found [1, 2, 3], must be a list of 2"),
        ("kd_loss.options=3", "kd_loss.options: found 3, must be a mapping of keys"),
        ("kd_loss.logits=''", "kd_loss.logits: found '', must be a word"),
        ("kd_loss.logits_options=3", "kd_loss.logits_options: found 3, must be a mapping of keys"),
        ("kd.warmup_epochs=-1", "kd.warmup_epochs: found -1, must be at least 0"),
        ("kd_loss.homo=yes", "kd_loss.homo: found 'yes', must be true or false"),
        ("pretrain.epochs=0", "pretrain.epochs: found 0, must be at least 1"),
    ],
)
def test_an_impossible_value_is_told_in_one_line(override, message):
    assert complaint(write("x.yml", PAIR), override) == f"command line: {message}"


def test_unknown_names_of_data_sets_distillers_and_losses_list_those_that_exist():
    assert complaint(write("x.yml", PAIR), "kd_loss.name=fitnt").startswith(
        "command line: kd_loss.name: unknown distiller 'fitnt': did you mean 'fitnet'? known are "
    )
    assert complaint(write("x.yml", PAIR), "kd_loss.logits=ddk").startswith(
        "command line: kd_loss.logits: unknown loss at the logits 'ddk': did you mean 'dkd'? known are "
    )
    assert complaint(write("x.yml", PAIR), "dataset.name=cifar-101").startswith(
        "command line: dataset.name: unknown dataset 'cifar-101': did you mean 'cifar-10"
    )


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("training.epoch=3", "training.epoch (did you mean training.epochs?)"),
        ("trainning.epochs=3", "trainning (did you mean training?)"),
        ("batch_size=3", "batch_size (did you mean training.batch_size?)"),
        ("kd_loss.classify_weight=3", "kd_loss.classify_weight (did you mean kd.loss_weights.classify_weight?)"),
        ("kd.teacher.checkpiont=3", "kd.teacher.checkpiont (did you mean kd.teacher.checkpoint?)"),
        ("xyzzy=3", "xyzzy"),
        ("training..epochs=3", "training."),
        ("<<={a: 1}", "<<"),
        (f"{'k' * 99}=3", "k" * 57 + "..."),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_probably_meant(override, rest):
    assert complaint(write("x.yml", PAIR), override) == f"command line: unknown key {rest}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; it needs keys such as dataset: and model:"),
        ("# nothing\n", "the file is empty; it needs keys such as dataset: and model:"),
        ("- a\n", "found ['a'] at the top, must be `key: value` lines"),
        ("word\n", "found 'word' at the top, must be `key: value` lines"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' stands here a second time"),
        ("a: {b: 1, b: 2}\n", "line 1, column 11: the key 'b' stands here a second time"),
        ("a: &x 1\nb: *x\n", "line 2, column 4: aliases are not read here; share keys between files with `base:`"),
        (
            "a: !!python/object:os.system {}\n",
            "line 1, column 4: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("a: !thing 3\n", "line 1, column 4: could not determine a constructor for the tag '!thing'"),
        ("a: !!int x\n", "not YAML: invalid literal for int() with base 10: 'x'"),
        ("a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("a: [1, 2\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document"),
        ("1: 2\n" + SINGLE, "the key [1] is no word; quotation marks make it one"),
        ("? [a]\n: 2\n", "line 1, column 3: found unhashable key"),
        (
            "a: \x07\n",
            "not YAML: unacceptable character #x0007: special characters are not allowed "
            'in "<byte string>", position 3',
        ),
        (
            b"a: caf\xe9\n",
            'not YAML: unacceptable character #x00e9: invalid continuation byte in "<byte string>", position 6',
        ),
        ("a: " + "[" * 2000, "nested too deeply to be a config"),
        ("base: 3\n", "base: found 3, must be a path or a list of paths"),
        ("base: [a.yml, {b: c}]\n", "base: found ['a.yml', {'b': 'c'}], must be a path or a list of paths"),
        ("base: y.yml\n", "base: y.yml: no such file (did you mean x.yml?)"),
        ("base: .\n", "base: .: is a folder, expected a file"),
        ("base: x.yml\n", "base: goes in a circle (x.yml -> x.yml)"),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_line(content, message):
    assert complaint(write("x.yml", content)) == f"x.yml: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {name: vgg8}\n", "dataset is missing"),
        (
            "dataset: {}\nmodel: {name: vgg8}\n",
            "dataset.name is missing (cifar-10, cifar-100, digits, imagefolder, imagenet, csv, parquet, tiny-imagenet, "
            "or your own)",
        ),
        ("dataset: {name: digits}\n", "found neither of model and kd, must be one: model trains alone, kd distils"),
        (PAIR + "model: {name: vgg8}\n", "found both of model and kd, must be one: model trains alone, kd distils"),
        (
            PAIR.replace("{name: vgg13}", "{name: vgg13, checkpoint: t.pth, new_head: true}"),
            "kd.teacher: found new_head beside checkpoint, which is of a teacher that is trained; "
            "train_single.sh model.checkpoint=<file> model.new_head=true trains one",
        ),
        (SINGLE + "kd_loss: {name: at}\n", "kd_loss without kd; the two go together: who teaches whom, and how"),
        (
            PAIR.replace("kd_loss: {name: at}\n", ""),
            "kd without kd_loss; the two go together: who teaches whom, and how",
        ),
        (
            PAIR.replace("{name: vgg13}", ""),
            "kd.teacher.name is missing (a model of models/, timm/<name>, or an import path, "
            "e.g. torchvision.models.resnet34)",
        ),
        (
            PAIR + "training: {epoch: 1, lr: 0, seed: x}\n",
            "unknown key training.epoch (did you mean training.epochs?) (and 2 more)",
        ),
        ("dataset: {name: digits}\nmodle: {name: vgg8}\n", "unknown key modle (did you mean model?)"),
        (SINGLE + '? "a\\nb"\n: 1\n', "unknown key a\\nb"),
    ],
)
def test_what_is_missing_or_does_not_fit_together_is_told_in_one_line(content, message):
    assert complaint(write("x.yml", content)) == f"x.yml: {message}"


def test_bases_named_again_and_again_are_read_once():
    # Read as often as it is named, the last file would be read 2**40 times.
    for number in range(40):
        write(f"{number}.yml", f"base: [{number + 1}.yml, {number + 1}.yml]\n")
    write("40.yml", SINGLE)
    assert load_config("0.yml").model.name == "vgg8"


def test_a_chain_of_bases_without_end_is_told_in_one_line():
    for number in range(60):
        write(f"{number}.yml", f"base: {number + 1}.yml\n")
    assert complaint("0.yml") == "50.yml: base: a chain of more than 50 files"


def test_circles_of_bases_are_told_with_their_way():
    write("a.yml", "base: b.yml\n")
    write("b.yml", "base: a.yml\n")
    assert complaint("a.yml") == "b.yml: base: goes in a circle (a.yml -> b.yml -> a.yml)"


def test_a_missing_file_is_told_with_the_closest_that_exists():
    write("configs/vgg8.yml", SINGLE)
    assert complaint("configs/vgg9.yml") == "configs/vgg9.yml: no such file (did you mean configs/vgg8.yml?)"
    assert complaint("config/vgg8.yml") == "config/vgg8.yml: no such file (did you mean configs?)"
    assert complaint("xyzzy") == "xyzzy: no such file"


@pytest.mark.parametrize("path", ["x.yml", "x.yml/y.yml"])
def test_a_link_that_leads_nowhere_is_not_offered_as_its_own_correction(path):
    Path("x.yml").symlink_to("gone.yml")
    assert complaint(path) == f"{path}: no such file (x.yml is a link to gone.yml, which leads nowhere)"


def test_a_pipe_is_refused_instead_of_waited_for():
    os.mkfifo("x.yml")
    assert complaint("x.yml") == "x.yml: is a pipe, expected a file"
    assert complaint("/dev/zero") == "/dev/zero: is a device, expected a file"


def test_a_folder_is_not_a_file():
    write("configs/vgg8.yml", SINGLE)
    assert complaint("configs") == "configs: is a folder, expected a file"
    assert complaint("configs/vgg8.yml/x") == "configs/vgg8.yml/x: cannot be read: Not a directory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--epochs", "found '--epochs', must be key=value, e.g. training.epochs=10"),
        ("=3", "found '=3', must be key=value, e.g. training.epochs=10"),
        ("a=[1", "'a=[1': line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("a=*x", "'a=*x': line 1, column 1: aliases are not read here; share keys between files with `base:`"),
        (".".join(2000 * "a") + "=1", "nested too deeply to be a config"),
        (
            f"a={'9' * 5000}",
            f"'a={'9' * 54}...: not YAML: Exceeds the limit (4300 digits) for integer string conversion: value has "
            "5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        ),
    ],
)
def test_overrides_that_are_none_are_told_in_one_line(override, message):
    assert complaint(write("x.yml", SINGLE), override) == f"command line: {message}"


def test_a_broken_dict_from_a_checkpoint_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^old\.pth: dataset is missing \(and 1 more\)$"):
        Config.from_dict({"training": {"lr": "x"}}, source="old.pth")
    with pytest.raises(UserError, match=r"^checkpoint: found 3, must be a mapping of keys$"):
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
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
@given(st.text() | st.text(alphabet="abx:-[]{}&*!|>'\"#,?% \n\t0.e~=<"))
def test_any_text_loads_or_is_refused_in_one_line(text):
    assert loads_or_says_why(lambda: load(text.encode("utf-8", "surrogatepass")))
    assert loads_or_says_why(lambda: load(SINGLE, text))
    assert loads_or_says_why(lambda: load(SINGLE, f"model.kwargs={text}"))


@_quick
@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_refused_in_one_line(raw):
    assert loads_or_says_why(lambda: load(raw))
