"""The README and docs/ as tests read them: their code blocks, and whether the things that they name exist."""

from __future__ import annotations

import argparse
import contextlib
import io
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import yaml
from launchers import handed_over

from models import MODELS
from utils.config import Config, find_config
from utils.config.changes import flatten
from utils.config.errors import all_fields
from utils.config.related import teacher_run
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]

LAUNCHERS = ("train.sh", "train_single.sh", "train_anti.sh")
OF_THE_SYSTEM = {"MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT"}
MAKES_FILES = ("mkdir", "sed", "cp")  # run for real, in the workplace
RUN_WITHOUT_TRAINING = {"utils.config": [], "utils.grid": ["--dry-run"]}  # of other commands the options are parsed

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<![`$])`([^`\n]+)`(?![`$])")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_COMMAND = re.compile(r"(\w+=\S* )*(sh|python|torchrun) (?!-m [\w.]+$)")
_KEY = re.compile(r"(dataset|training|validation|model|kd|kd_loss|pretrain|run)(\.\w+)+(=.*)?")
_NAME = re.compile(r"(?:python -m )?((models|distillers|datasets|utils)(\.\w+)+)")
_PATH = re.compile(r"((configs|models|distillers|datasets|utils|tests|docs|\.ci)/[\w./<>*-]*|[\w-]+\.(sh|py|toml|cff))")


def blocks(document: str, language: str) -> list[str]:
    """All code blocks of one language in a document's text."""
    return [text for found, text in _FENCE.findall(document) if found == language]


def shown_files() -> dict[str, str]:
    """The files that docs/extending.md shows: blocks whose first line is a comment with a path."""
    document = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
    texts = [text for language in ("python", "yaml") for text in blocks(document, language)]
    return {match[1]: text for text in texts if (match := re.match(r"# (\S+/\S+\.\w+)\n", text))}


def shown_file(name: str) -> str:
    """The text of a file that docs/extending.md shows."""
    return shown_files()[name]


def execute(name: str, text: str) -> dict:
    """Run Python code as a module of its own; its namespace."""
    module = types.ModuleType(name)
    exec(compile(text, name, "exec"), vars(module))
    return vars(module)


def make_workplace(folder: Path) -> None:
    """A checkout in which the documents' commands may make configs, and their example files are there."""
    for entry in REPOSITORY.iterdir():
        if entry.name not in (".git", "configs", "data", "run"):
            (folder / entry.name).symlink_to(entry)
    (folder / "configs").mkdir()
    for entry in (REPOSITORY / "configs").iterdir():
        (folder / "configs" / entry.name).symlink_to(entry)
    for name, text in shown_files().items():
        if name.endswith(".py"):
            execute(name.removesuffix(".py").replace("/", "."), text)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8"), "sh"):
            for _, words in commands(block):
                if words and words[0] in MAKES_FILES:
                    quoted = (word if word in (">", ">>") else shlex.quote(word) for word in words)
                    subprocess.run(["sh", "-c", " ".join(quoted)], cwd=folder, check=True)


def commands(script: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Every command of a shell script: the variables that are set for it, and its words."""
    exported: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        is_export = words[:1] == ["export"]
        variables, words = dict(exported), words[is_export:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            variables[match[1]] = match[2]
            words.pop(0)
        if is_export:
            exported = variables
        if words or variables != exported:
            yield variables, words


def problems(text: str, workplace: Path, place: Path = REPOSITORY) -> list[str]:
    """What is wrong with a document, a line each.

    Args:
        text: the document.
        workplace: made by `make_workplace`, and the current directory.
        place: folder of the document, to which its links are relative.
    """
    prose = _FENCE.sub("", text)
    checks: list[tuple[Callable[..., None], tuple]] = [
        *((check_command, command) for block in blocks(text, "sh") for command in commands(block)),
        *((check_yaml, (block,)) for block in blocks(text, "yaml")),
        *((check_code, (code, workplace)) for code in _INLINE.findall(prose)),
        *((check_link, (target, text, place)) for target in _LINK.findall(prose)),
    ]
    found = []
    for check, arguments in checks:
        try:
            check(*arguments)
        except (UserError, ImportError, AttributeError) as error:
            found.append(f"{arguments[:-1] or arguments}: {error}")
    return found


def check_code(code: str, workplace: Path) -> None:
    """A piece of code within a sentence: a command, a config key, a file, a name in Python, or none of these."""
    if _COMMAND.match(code):
        for variables, words in commands(code):
            check_command(variables, words)
    elif _KEY.fullmatch(code):
        check_key(code)
    elif match := _NAME.fullmatch(code):
        pkgutil.resolve_name(match[1])
    elif _PATH.fullmatch(code) and not list(workplace.glob(re.sub(r"<[^>]*>", "*", code))):
        raise UserError(f"{code}: no such file")


def check_command(variables: Mapping[str, str], words: list[str]) -> None:
    """That a command would be accepted in the current directory. Nothing is trained."""
    if unknown := variables.keys() - launcher_variables() - OF_THE_SYSTEM:
        raise UserError(f"no launcher has a variable {', '.join(unknown)}")
    match words:
        case ["sh", script, *arguments] if script in LAUNCHERS:
            run_python(handed_over(script, *arguments, cwd=Path.cwd(), **variables))
        case ["python", *arguments]:
            run_python(arguments)
        case ["torchrun", *arguments]:
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(arguments)
            run_python([options.training_script, *options.training_script_args])
        case ["sh", "test.sh", *_] | ["tensorboard", *_] | [("mkdir" | "sed" | "cp"), *_]:
            pass
        case _:
            raise UserError(f"unknown command {' '.join(words)!r}")


def launcher_variables() -> set[str]:
    """The variables that the launchers read."""
    text = "".join((REPOSITORY / launcher).read_text() for launcher in LAUNCHERS)
    return set(re.findall(r"\$\{(\w+)[:}]", re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)))


class _Parsed(BaseException):
    """Raised in place of the work of a command that has read its options."""


def run_python(arguments: list[str]) -> list[Config]:
    """Run a command of the project up to the training; of other commands, read the options.

    Returns:
        the configs that it would train.
    """
    if arguments[:2] == ["-m", "utils.launch"]:
        return run_python(arguments[3:])
    if arguments[:2] == ["-m", "pip"]:
        return []  # it would install
    run, (name, *words) = (runpy.run_path, arguments) if arguments[0] != "-m" else (runpy.run_module, arguments[1:])
    goes_on = name in RUN_WITHOUT_TRAINING or Path(name).with_suffix(".sh").name in LAUNCHERS
    configs: list[Config] = []

    def train(config: Config, *, teacher_args: tuple[str, ...] = (), **_: object) -> None:
        configs.extend([config, *([teacher_run(config, teacher_args).config] if teacher_args else [])])

    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        stack.enter_context(mock.patch("utils.training.run.train", train))
        stack.enter_context(mock.patch("utils.training.dry_run.dry_run"))
        stack.enter_context(mock.patch.object(sys, "argv", [name, *words, *RUN_WITHOUT_TRAINING.get(name, [])]))
        for parse in () if goes_on else ("parse_args", "parse_intermixed_args"):
            stopping = _stop_after(getattr(argparse.ArgumentParser, parse))
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, parse, stopping))
        try:
            run(name, run_name="__main__")
        except _Parsed:
            pass
        except (SystemExit, OSError, ImportError) as end:
            if getattr(end, "code", True):
                raise UserError(f"{output.getvalue()}{end}") from None
    for config in configs:
        for model in filter(None, (config.model, config.kd and config.kd.teacher, config.kd and config.kd.student)):
            if "." not in model.name and not model.name.startswith("timm/"):
                MODELS.get(model.name)
    return configs


def _stop_after(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
    def parse_and_stop(*arguments, **options):
        namespace = parse(*arguments, **options)
        for word in [*getattr(namespace, "overrides", []), *getattr(namespace, "words", [])]:
            if "=" in word:
                check_key(word)
        raise _Parsed

    return parse_and_stop


def check_key(text: str) -> None:
    """``key`` or ``key=value``; capitals stand for any value."""
    key, _, value = text.partition("=")
    if not _is_key(key):
        raise UserError(f"no such key {key}")
    if value and not re.fullmatch(r"[A-Z]+", value):
        _digits(key.startswith("model.")).load([text])


def check_yaml(text: str) -> None:
    """Settings as in a config file, complete or not."""
    data = yaml.safe_load(text)
    data.pop("base", None)  # another file
    for key in flatten(data):
        if not _is_key(key):
            raise UserError(f"no such key {key}")
    layers = _digits("model" in data)
    layers.add(data, "yaml")
    Config.from_dict(layers.data, layers.source)


def _is_key(key: str) -> bool:
    fields = {".".join(parts): field for parts, field in all_fields(Config)}
    mappings = [f"{known}." for known, field in fields.items() if field.default == {}]
    return any(f"{known}.".startswith(f"{key}.") for known in fields) or key.startswith(tuple(mappings))


def _digits(is_single: bool):
    """A config of a network alone, or of a pair."""
    if is_single:
        return find_config("digits", 1029, model="resnet8")
    return find_config("digits", 1029, teacher="resnet20", student="resnet8", distiller="at")


def check_link(target: str, document: str, place: Path) -> None:
    """A link to a page of the web, or to a file and a heading that exist."""
    if target.startswith("https://"):
        return
    file, _, anchor = target.partition("#")
    if file and not (place / file).exists():
        raise UserError(f"{target}: no such file")
    if anchor and anchor not in anchors((place / file).read_text(encoding="utf-8") if file else document):
        raise UserError(f"{target}: no such heading")


def anchors(document: str) -> list[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
