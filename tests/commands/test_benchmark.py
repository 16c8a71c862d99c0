"""The benchmark: its cases, times, memory, and the table."""

import gc
import json
import weakref
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from utils.benchmark.__main__ import main, milliseconds
from utils.benchmark.cases import Case, Conditions, Kind, Pair
from utils.benchmark.measure import lasting_bytes, measure_pair, peak_memory, seconds
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = Conditions(CPU, batch_size=4, size=16, num_classes=10, samples=60, rounds=2)
PAIR = Pair("resnet8", "resnet8")


def test_the_command_measures_and_prints_every_case_beside_plain_kd(tmp_path, capsys):
    """Compared with an earlier run whose steps took a millionth of a second."""
    then = [{"pair": "resnet8-resnet8", "kind": kind, "seconds": 1e-6} for kind in ("kd fixed", "fsp adaptive")]
    (tmp_path / "then.json").write_text(json.dumps({"results": then}))
    words = ["resnet8-resnet8,vgg8-resnet8", "fsp", "--share", "1", "1/4", "--compare", str(tmp_path / "then.json")]
    words += ["--batch-size", "4", "--size", "16", "--samples", "60", "--rounds", "1", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "figures.json")]) == 0
    lines, figures = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "figures.json").read_text())
    kinds = ["kd fixed", "fsp fixed", "fsp adaptive", "fsp adaptive 1/4"]
    rows = [*(("resnet8-resnet8", kind) for kind in kinds), ("vgg8-resnet8", "kd fixed")]  # FSP refuses unequal widths
    results = figures["results"]
    assert [(r["pair"], r["kind"]) for r in results] == rows
    for r in results:
        unit = results[0] if r["pair"] == "resnet8-resnet8" else r
        assert r["memory_ratio"] == pytest.approx(r["bytes"] / unit["bytes"])
        assert (r["time_ratio"] == 1) == (r is unit or r["kind"] == "kd fixed")
        assert not r["captured"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert table[0] == ["pair", "step", "ms", "x KD", "MiB", "x KD, MiB", "steps are", "ms, now / then"]
    found = results[3]
    expected = ["resnet8-resnet8", kinds[3], milliseconds(found["seconds"]), f"{found['time_ratio']:.2f}"]
    expected += [f"{found['bytes'] / 2**20:.0f}", f"{found['memory_ratio']:.2f}", "eager", ""]
    assert table[2 + 3] == expected
    assert [bool(row[-1]) for row in table[2:]] == [True, False, True, False, False]
    assert float(table[2][-1]) > 100
    assert f"PyTorch {torch.__version__}; fp32, batch 4, 16x16 pixels, kd.routing_share 1, 1/4" in lines[0]
    assert any(line.startswith("about ") and line.endswith(" for 8 kinds of steps") for line in lines)
    assert figures["conditions"]["samples"] == 60


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["resnet8-resnet9"], "unknown model 'resnet9'"),
        (["resnet8-resnet8", "ta"], "unknown distiller 'ta'"),
        (
            ["resnet8-resnet8", "at", "--share", "x"],
            "argument --share: found 'x', must be a number",
        ),
        (["resnet8-resnet8", "at", "--compare", "tests"], "--compare: reading tests failed"),
        (["resnet8-resnet8", "at", "--json", "tests"], "--json: tests: is a folder, expected the name of a file"),
    ],
)
def test_what_cannot_be_measured_is_one_line(words, line):
    with pytest.raises(UserError, match=line):
        main(words)


def test_times_have_three_digits():
    numbers = (0.00123456, 0.0123456, 0.1234, 12.3456)
    assert [milliseconds(number) for number in numbers] == ["1.23", "12.3", "123", "12346"]


def test_steps_are_measured_in_turn_and_their_medians_told(monkeypatch):
    calls, times = [], {"slow": iter([2.0, 30.0, 3.0]), "fast": iter([1.0, 1.5, 50.0])}

    class Timer:
        def __init__(self, statement, globals, num_threads):
            self.name = globals["step"]()

        def timeit(self, number):
            calls.append((self.name, number))
            return SimpleNamespace(mean=next(times[self.name]))

    monkeypatch.setattr("utils.benchmark.measure.Timer", Timer)
    assert seconds([lambda: "slow", lambda: "fast"], 3, 60) == [3.0, 1.5]
    assert calls == [("slow", 60), ("fast", 60)] * 3


def test_beside_plain_kd_only_one_case_exists_at_a_time(monkeypatch):
    there, seen = weakref.WeakSet(), []

    class Counted(Case):
        def __init__(self, *given):
            gc.collect()
            super().__init__(*given)
            there.add(self)
            seen.append(len(there))

    monkeypatch.setattr("utils.benchmark.measure.Case", Counted)
    kinds = [Kind("at", "fixed"), Kind("at", "adaptive"), Kind("at", "adaptive", Fraction(1, 4))]
    assert len(list(measure_pair(PAIR, kinds, SMALL))) == 4
    assert seen == [1, 1, 2, 2, 2]


def test_a_case_computes_as_a_run_does():
    torch.backends.cudnn.benchmark = False
    made = Case(PAIR, Kind("at", "adaptive", Fraction(1, 4)), SMALL)
    assert torch.backends.cudnn.benchmark
    assert made.task.routing_share == 0.25


def test_peak_memory_counts_what_lives_at_the_same_time():
    mib = 2**18  # float32 numbers

    def step():
        first = torch.zeros(3 * mib)
        del first
        second, third = torch.zeros(2 * mib), torch.zeros(2 * mib)
        del second, third

    weight = torch.zeros(5 * mib)
    task = SimpleNamespace(parameters=lambda: [weight], buffers=lambda: [weight[:10]])  # the same memory twice
    fake = SimpleNamespace(task=task, batch=(torch.zeros(mib),), optimizers={}, step=step)
    assert lasting_bytes(fake) == 6 * 2**20
    assert peak_memory(fake, CPU, before=0) == pytest.approx((6 + 4) * 2**20, rel=1e-3)


def test_an_adaptive_step_takes_at_most_half_as_much_memory_again_as_plain_kd():
    conditions, peaks = Conditions(CPU, batch_size=16), []
    for kind in (Kind("kd", "fixed"), Kind("at", "adaptive")):
        measured = Case(Pair("resnet14", "resnet8"), kind, conditions)
        measured.step()  # momentum is there from now on
        peaks.append(peak_memory(measured, CPU, before=0))
    plain, adaptive = peaks
    assert adaptive < 1.5 * plain
