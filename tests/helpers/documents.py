"""The README and docs/ as a test reads them: their code blocks, and what is wrong with what they say."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

LAUNCHERS = ("train.sh", "train_single.sh", "train_anti.sh")
OF_THE_SYSTEM = {"MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT"}
MAKES_FILES = ("mkdir", "sed", "cp")  # run for real, in the workplace
RUNS_WITHOUT_TRAINING = {"utils.config": [], "utils.grid": ["--dry-run"]}  # of all others, the options are parsed

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<![`$])`([^`\n]+)`(?![`$])")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
_COMMAND = re.compile(r"(\w+=\S* )*(sh|python|torchrun|tensorboard) ")
_MODULE = re.compile(r"python -m [\w.]+")
_KEY = re.compile(r"(dataset|training|validation|model|kd|kd_loss|pretrain|run)(\.\w+)+(=.*)?")
_NAME = re.compile(r"(models|distillers|datasets|utils)(\.\w+)+")
_PATH = re.compile(r"((configs|models|distillers|datasets|utils|tests|docs|\.ci)/[\w./<>*-]*|[\w-]+\.(sh|py|toml|cff))")


class Wrong(Exception):
    """What a document says does not hold."""


@dataclass(frozen=True)
class Block:
    """Code between fences.

    Attributes:
        line: number of its first line.
        language: what stands behind the fence.
        text: the code.
    """

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block shows, if its first line is a comment with a path."""
        match = re.match(r"# (\S+/\S+\.\w+)\n", self.text)
        return match and match[1]


def blocks(document: str, language: str) -> list[Block]:
    """All code blocks of one language in a document's text."""
    found = (Block(document[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in _FENCE.finditer(document))
    return [block for block in found if block.language == language]


def shown_file(name: str) -> str:
    """The text of a file that docs/extending.md shows."""
    document = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
    (text,) = (
        block.text for language in ("python", "yaml") for block in blocks(document, language) if block.file == name
    )
    return text


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
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in blocks(text, "yaml"):
            if block.file:
                (folder / block.file).parent.mkdir()
                (folder / block.file).write_text(block.text)
        for block in blocks(text, "python"):
            if block.file:
                execute(block.file.removesuffix(".py").replace("/", "."), block.text)
        for block in blocks(text, "sh"):
            for _, _, words in commands(block.text):
                if words and words[0] in MAKES_FILES:
                    subprocess.run(["sh", "-c", _joined(words)], cwd=folder, check=True)


def _joined(words: list[str]) -> str:
    return " ".join(word if word in (">", ">>") else shlex.quote(word) for word in words)


def commands(script: str) -> Iterator[tuple[int, dict[str, str], list[str]]]:
    """Every command of a shell script: its line, the variables that are set for it, and its words."""
    exported: dict[str, str] = {}
    line = 0
    for text in re.sub(r"\\\n", "\\\\\f", script).split("\n"):
        words = shlex.split(text.replace("\\\f", " "), comments=True)
        variables = dict(exported)
        exporting = words[:1] == ["export"]
        words = words[exporting:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])):
            variables[match[1]] = match[2]
            words.pop(0)
        if exporting:
            exported = variables
        if words or variables != exported:
            yield line, variables, words
        line += 1 + text.count("\f")


def problems(text: str, workplace: Path, place: Path = REPOSITORY) -> list[str]:
    """What is wrong with a document, a line each.

    Args:
        text: the document.
        workplace: made by `make_workplace`, and the current directory.
        place: folder of the document, to which its links are relative.
    """
    checks: list[tuple[int, str, Callable[[], None]]] = []

    def check(line: int, what: str, function: Callable[..., None], *arguments: object) -> None:
        checks.append((line, what, partial(function, *arguments)))

    prose = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for block in blocks(text, "sh"):
        for line, variables, words in commands(block.text):
            check(block.line + line, " ".join(words), check_command, variables, words, workplace)
    for block in blocks(text, "yaml"):
        check(block.line, "yaml", check_yaml, block.text)
    for number, line in enumerate(prose.split("\n"), 1):
        for code in _INLINE.findall(line):
            check(number, code, check_code, code, workplace)
        for target in _LINK.findall(line):
            check(number, target, check_link, target, text, place)
        check(number, line, check_formulas, line)
    found = []
    for number, what, run in checks:
        try:
            run()
        except (Wrong, UserError) as error:
            found.append(f"line {number}: {what}: {error}")
    return found


def check_code(code: str, workplace: Path) -> None:
    """A piece of code within a sentence: a command, a config key, a file, a name in Python, or none of these."""
    if _MODULE.fullmatch(code):
        check_name(code.removeprefix("python -m "))
    elif _COMMAND.match(code):
        for _, variables, words in commands(code):
            check_command(variables, words, workplace)
    elif _KEY.fullmatch(code):
        check_key(code)
    elif _NAME.fullmatch(code):
        check_name(code)
    elif _PATH.fullmatch(code) and not list(workplace.glob(re.sub(r"<[^>]*>", "*", code))):
        raise Wrong("no such file")


def check_command(variables: Mapping[str, str], words: list[str], workplace: Path) -> None:
    """That a command would be accepted. Nothing is trained."""
    if not words:
        raise Wrong("sets variables for no command; export keeps them")
    program, *arguments = words
    if unknown := variables.keys() - launcher_variables() - OF_THE_SYSTEM:
        raise Wrong(f"no launcher has a variable {', '.join(unknown)}")
    if program == "sh" and arguments[0] in LAUNCHERS:
        run_python(handed_over(*arguments, cwd=workplace, **variables))
    elif program == "sh" and arguments[0] == "test.sh":
        check_test_arguments(arguments[1:])
    elif program == "python":
        run_python(arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = _parsed(lambda: get_args_parser().parse_args(arguments), go_on=True)
        run_python([options.training_script, *options.training_script_args])
    elif program not in (*MAKES_FILES, "tensorboard"):
        raise Wrong(f"unknown command {program}")


def launcher_variables() -> set[str]:
    """The variables that the launchers read."""
    text = "".join((REPOSITORY / launcher).read_text() for launcher in LAUNCHERS)
    code = re.sub(r"^\s*#.*", "", text, flags=re.MULTILINE)
    return set(re.findall(r"\$\{(\w+)[:}]", code))


def check_test_arguments(arguments: list[str]) -> None:
    """Those of test.sh, which are pytest's: a path, or -m and a marker."""
    markers = re.findall(r'^    "(\w+): ', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    known = arguments in ([], *(["-m", marker] for marker in markers))
    if not (known or all((REPOSITORY / argument).exists() for argument in arguments)):
        raise Wrong("no such test or marker")


class _Parsed(BaseException):
    """Raised in place of what a command does once it has read its options."""


def run_python(arguments: list[str]) -> list[Config]:
    """Run a command of the project as far as it goes without training, writing or reading a run.

    Returns:
        what it would train.
    """
    if arguments[:2] == ["-m", "utils.launch"]:
        return run_python(arguments[3:])
    if arguments[:2] == ["-m", "pip"]:
        return []  # it would install
    configs: list[Config] = []

    def train(config: Config, *, resume: bool, overwrite: bool, teacher_args: Sequence[str], command: object) -> None:
        configs.append(config)
        if teacher_args:
            configs.append(teacher_run(config, teacher_args).config)

    with mock.patch("utils.training.run.train", train):
        if arguments[0] == "-m":
            module, *rest = arguments[1:]
            more = RUNS_WITHOUT_TRAINING.get(module)
            with _sys_argv([module, *rest, *(more or [])]):
                _parsed(lambda: runpy.run_module(module, run_name="__main__"), go_on=more is not None)
        else:
            if not Path(arguments[0]).exists():
                raise Wrong(f"no such file {arguments[0]}")
            trains = Path(arguments[0]).with_suffix(".sh").name in LAUNCHERS  # other scripts would write
            with _sys_argv(arguments):
                _parsed(lambda: runpy.run_path(arguments[0], run_name="__main__"), go_on=trains)
    for config in configs:
        for model in filter(None, (config.model, config.kd and config.kd.teacher, config.kd and config.kd.student)):
            if model.name.startswith("timm/"):
                continue  # an optional package knows them
            check_name(model.name) if "." in model.name else MODELS.get(model.name)
    return configs


def _parsed(run: Callable[[], object], go_on: bool = False) -> object:
    """Do `run`, up to the point where it has read its options unless it is to go on. What it complains of is raised."""
    output = io.StringIO()

    def stop_after(parse):
        def parse_and_stop(*arguments, **options):
            namespace = parse(*arguments, **options)
            for word in [*getattr(namespace, "overrides", []), *getattr(namespace, "words", [])]:
                if "=" in word:
                    check_key(word)
            raise _Parsed

        return parse_and_stop

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        if not go_on:
            for name in ("parse_args", "parse_intermixed_args"):
                original = getattr(argparse.ArgumentParser, name)
                stack.enter_context(mock.patch.object(argparse.ArgumentParser, name, stop_after(original)))
        try:
            return run()
        except _Parsed:
            return None
        except SystemExit as end:
            if end.code:
                raise Wrong(output.getvalue()) from None
        except ImportError as error:
            raise Wrong(str(error)) from None


@contextlib.contextmanager
def _sys_argv(arguments: list[str]) -> Iterator[None]:
    with mock.patch.object(sys, "argv", arguments):
        yield


def check_key(text: str) -> None:
    """``key`` or ``key=value``; of the value, alternatives may stand side by side, or capitals in place of any."""
    key, _, value = text.partition("=")
    if not _is_key(key):
        raise Wrong("no such key")
    if value and not re.fullmatch(r"[A-Z]+", value):
        _digits(of=key.partition(".")[0]).load([text])


def check_yaml(text: str) -> None:
    """Settings as in a config file, complete or not."""
    data = yaml.safe_load(text)
    for key in flatten(data):
        if not _is_key(key):
            raise Wrong(f"no such key {key}")
    layers = _digits(of="model" if "model" in data else "kd").layers.copy()
    layers.add(data, "yaml")
    Config.from_dict(layers.data, layers.source)


def _is_key(key: str) -> bool:
    fields = {".".join(parts): field for parts, field in all_fields(Config)}
    if any(key == known or known.startswith(f"{key}.") for known in fields):
        return True
    mappings = [known for known, field in fields.items() if field.default == {}]
    return any(key.startswith(f"{known}.") for known in mappings)


def _digits(of: str):
    """A config that has the section `of`."""
    if of == "model":
        return find_config("digits", 1029, model="resnet8")
    return find_config("digits", 1029, teacher="resnet20", student="resnet8", distiller="at")


def check_name(name: str) -> None:
    """A dotted name that can be imported."""
    module, attributes = name, []
    while module:
        try:
            found = importlib.import_module(module)
            break
        except ImportError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
    else:
        raise Wrong("cannot be imported")
    for attribute in attributes:
        if not hasattr(found, attribute):
            raise Wrong(f"{module} has no {attribute}")
        found = getattr(found, attribute)


def check_formulas(line: str) -> None:
    """GitHub's Markdown takes backslashes and underscores out of $...$, but not out of $`...`$."""
    if "$" in re.sub(r"\$`[^`]*`\$|`[^`]*`", "", line):
        raise Wrong("write formulas as $`...`$ or as a math block")


def check_link(target: str, document: str, place: Path) -> None:
    """A link to a page of the web, or to a file and a heading that exist."""
    if target.startswith("https://"):
        return
    file, _, anchor = target.partition("#")
    if file and not (place / file).exists():
        raise Wrong("no such file")
    if anchor and anchor not in anchors((place / file).read_text(encoding="utf-8") if file else document):
        raise Wrong("no such heading")


def anchors(document: str) -> list[str]:
    """What GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
