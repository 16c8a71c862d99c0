"""Who imports whom, read off the source: imports inside functions count, too."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "distillers", "datasets", "utils")


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


def test_networks_data_and_losses_do_not_know_the_training_loop():
    for module, imported in imports().items():
        if module.split(".")[0] != "utils":
            assert not any(name.startswith("utils.training") for name in imported), module


def test_no_command_is_imported_by_another_module():
    importers = {module for module, imported in imports().items() if any(x.endswith("__main__") for x in imported)}
    assert not importers


def test_training_draws_nothing():
    """Figures wait for the report: what they need may be slow, or missing, and the last epoch must be saved first."""
    graph = imports()
    reached, waiting = set(), [module for module in graph if module.startswith("utils.training")]
    while waiting:
        module = waiting.pop()
        waiting += graph[module] - reached
        reached |= graph[module]
    assert not [module for module in reached if module.startswith("utils.report")]


def test_a_plain_distillation_on_digits_loads_nothing_of_the_routing_and_no_library_that_it_can_do_without():
    code = """
import sys
from datasets import Batch, open_data
from utils.config import find_config
from utils.training import run
from utils.training.build import build_task

config = find_config("digits", 1, teacher="resnet14", student="resnet8", distiller="at").load(["kd.selection=fixed"])
opened = open_data(config.dataset)
task = build_task(config, opened).train()
images, labels = opened.train.images[:2] / 255, opened.train.labels[:2]
for output in task(Batch(images, labels, labels)):
    output.loss.backward()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "distillers.spot_adaptive.distillation" in loaded
    routing = {f"distillers.spot_adaptive.{name}" for name in ("policy", "routing", "twin", "frozen")}
    assert not loaded & (routing | {"torchvision", "sklearn", "matplotlib", "pandas"})
