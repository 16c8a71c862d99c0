"""Who imports whom, read off the source: imports inside functions count, too."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "distillers", "datasets", "utils")


@functools.cache
def imports() -> dict[str, set[str]]:
    """Of every module of the project, the modules of the project that it imports."""
    files = {path.relative_to(REPO).with_suffix(""): path for name in PACKAGES for path in (REPO / name).rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for name, path in files.items()}
    graph = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {
                    name if name in modules else node.module for name in (f"{node.module}.{a.name}" for a in node.names)
                }
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module] = found & modules.keys() - {module}
    return graph


def test_no_imports_go_in_a_circle():
    TopologicalSorter(imports()).prepare()  # raises an error that names the circle


def test_networks_data_and_losses_do_not_know_the_training_loop_and_nobody_knows_a_command():
    for module, imported in imports().items():
        assert not any(name.endswith("__main__") for name in imported), module
        if module.split(".")[0] != "utils":
            assert not any(name.startswith("utils.training") for name in imported), module


def test_training_draws_nothing():
    """Figures wait for the report: what they need may be slow, or missing, and the last epoch must be saved first."""
    graph = imports()
    reached, waiting = set(), [module for module in graph if module.startswith("utils.training")]
    while waiting:
        module = waiting.pop()
        waiting += graph[module] - reached
        reached |= graph[module]
    assert not [module for module in reached if module.startswith("utils.report")]


def test_every_step_of_a_command_loads_only_what_it_needs():
    """Signals and --help are answered before PyTorch is there, and a plain distillation needs few libraries."""
    code = """
import sys, utils.launch, utils.cli
print(*sys.modules)

from utils.config import find_config
config = find_config("digits", 1, teacher="resnet14", student="resnet8", distiller="AT").load(["kd.selection=fixed"])
try: utils.cli.main_distill(arguments=["--help"])
except SystemExit: print(*sys.modules)

from datasets import Batch, open_data
from utils.training import run
from utils.training.build import build_task
opened = open_data(config.dataset)
task = build_task(config, opened).train()
images, labels = opened.train.images[:2] / 255, opened.train.labels[:2]
for output in task(Batch(images, labels, labels)):
    output.loss.backward()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    first, *usage, configured, trained = done.stdout.splitlines()
    assert not {"torch", "numpy", "pydantic", "yaml"} & set(first.split())
    assert "torch" not in configured.split()
    assert any("fitnet" in line for line in usage)
    loaded = set(trained.split())
    assert "distillers.spot_adaptive.distillation" in loaded
    assert not loaded & {"torchvision", "sklearn", "matplotlib", "pandas"}
