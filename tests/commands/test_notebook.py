"""docs/distil_your_own.ipynb: its code runs from the first cell to the last."""

import json

import pandas as pd
from documents import REPOSITORY, make_workplace
from test_advise import be_quick
from test_docs import REGISTRIES

NOTEBOOK = json.loads((REPOSITORY / "docs/distil_your_own.ipynb").read_text(encoding="utf-8"))
SHORT = {
    "number % (1 + label) == 0": "number % (5 + label) == 0",
    "EPOCHS, SEEDS = 15, [1, 2]": "EPOCHS, SEEDS = 1, [1]",
    '["kd", "at"]': '["kd"]',
    'subprocess.run([sys.executable, "-m", "utils.report", "run/advice"], check=True)': (
        'from utils.report.__main__ import main as report; report(["run/advice", "--no-plots"])'
    ),
}


def test_the_notebook_makes_a_student_and_predicts_by_it(tmp_path, monkeypatch):
    for registry in REGISTRIES:  # the workplace has the documents' own entries
        monkeypatch.setattr(registry, "_entries", {name: registry.get(name) for name in registry})
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    be_quick(monkeypatch)
    code = "\n\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(compile(code, "distil_your_own.ipynb", "exec"), names)
    assert set(names["table"]["training"]) == {"alone", "teacher", "kd, fixed"}
    assert len(pd.read_csv("run/predictions.csv")) == len(list((tmp_path / "data/my-images/four").iterdir()))
