"""The benchmark measures what it says it measures."""

import json
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from published_checkout import write_checkout

from distillers import DISTILLERS
from utils.benchmark.__main__ import DISTILLER_NAMES, main
from utils.benchmark.cases import Case, Conditions, Kind, Pair
from utils.benchmark.measure import Stopwatch, lasting_bytes, peak_memory, phase_seconds, seconds
from utils.benchmark.published import PublishedSteps
from utils.benchmark.suite import WARM_UP, Result, measure_pair
from utils.benchmark.tables import milliseconds, pair_table, price_table
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = Conditions(CPU, batch_size=4, size=16, num_classes=10, samples=60, rounds=2)
PAIR = Pair("resnet8", "resnet8")


def test_every_distiller_is_measured_unless_some_are_named():
    assert {"kd", *DISTILLER_NAMES.split(",")} == set(DISTILLERS)


def case(distiller="at", selection="adaptive", conditions=SMALL, pair=PAIR):
    return Case(pair, Kind(distiller, selection), conditions)


def result(pair="a-b", distiller="at", selection="adaptive", share="1", **values):
    defaults = {"captured": False, "seconds": 1.0, "bytes": 1, "time_ratio": 1.0, "memory_ratio": 1.0}
    return Result(pair, distiller, selection, share, **defaults | values)


def run(folder, *words):
    """What the command prints, and the figures that it writes."""
    small = ["--batch-size", "4", "--size", "16", "--samples", "60", "--rounds", "2", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        patch.setattr("utils.benchmark.suite.log.info", lambda text, *words: printed.append(text % words))
        assert main([*words, *small, "--json", str(folder / "figures.json")]) == 0
    return "\n".join(printed), json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return run(folder, "resnet8-resnet8,vgg8-resnet8", "fsp,crd", "--share", "1", "1/4")


@pytest.fixture(scope="module")
def published(report, tmp_path_factory):
    """With a checkout of the published code, and compared with figures of a run that took a millionth of the time."""
    folder = tmp_path_factory.mktemp("published")
    figures = json.loads(json.dumps(report[1]))
    for measured in figures["results"]:
        measured["seconds"] /= 1e6
    figures["conditions"]["precision"] = "bf16"
    (folder / "then.json").write_text(json.dumps(figures))
    checkout = write_checkout(folder / "checkout", "resnet8-resnet8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS", str(folder / "steps"))
        words = ["--published", str(checkout), "--compare", str(folder / "then.json")]
        text, figures = run(folder, "resnet8-resnet8", "crd,pkt", *words)
    return text, {(r["distiller"], r["selection"]): r for r in figures["results"]}, (folder / "steps").read_text()


class TestCommand:
    def test_every_case_is_there_and_plain_kd_is_the_unit(self, report):
        results = report[1]["results"]
        names = [(r["pair"], r["distiller"], r["selection"], r["share"]) for r in results]
        wanted = [("fixed", "1"), ("adaptive", "1"), ("adaptive", "1/4")]
        fsp, crd = ([(name, *selection) for selection in wanted] for name in ("fsp", "crd"))
        plain = ("kd", "fixed", "1")
        assert names[:7] == [("resnet8-resnet8", *words) for words in (plain, *fsp, *crd)]
        assert names[7:] == [("vgg8-resnet8", *words) for words in (plain, *crd)]  # unequal widths
        for r in results:
            unit = next(u for u in results if u["pair"] == r["pair"] and u["distiller"] == "kd")
            assert r["memory_ratio"] == pytest.approx(r["bytes"] / unit["bytes"])
            assert (r["time_ratio"] == 1) == (r is unit)
            assert not r["captured"]

    def test_the_phases_are_the_whole_step_and_routing_is_the_policys_alone(self, report):
        for r in report[1]["results"]:
            assert sum(r["phases"].values()) == pytest.approx(1)
            assert min(r["phases"].values()) > 0
            parts = {"data", "teacher", "student", "backward", "optimisers", "rest"}
            assert r["phases"].keys() == parts | ({"routing"} if r["selection"] == "adaptive" else set())

    def test_the_tables_and_the_machine_are_printed(self, report):
        text, figures = report
        assert f"PyTorch {torch.__version__}; fp32, batch 4, 16x16 pixels, median of 2 steps" in text
        assert "| crd adaptive 1/4 |" in text
        assert "adaptive steps in units of plain KD's, kd.routing_share 1 → 1/4\n|" in text
        assert "published" not in text
        assert "now / then" not in text
        assert figures["conditions"]["samples"] == 60
        assert f"{figures['loaders']['memory']:,.0f} images/s" in text

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["resnet8-resnet9"], "resnet8-resnet9: no such pair; expected <teacher>-<student>"),
            (["resnet8-resnet8", "ta"], "unknown distiller 'ta'"),
            (["resnet8-resnet8", "at", "--share", "5/4"], "found '5/4', must be a number above 0 and up to 1"),
            (["resnet8-resnet8", "at", "--share", "1/0"], "found '1/0', must be"),
            (["resnet8-resnet8", "at", "--published", "tests"], "tests: no checkout of the published code, it lacks"),
            (["resnet8-resnet8", "at", "--compare", "tests"], "tests: cannot be read"),
            (["resnet8-resnet8", "at", "--json", "tests"], "--json: tests: is a folder, expected the name of a file"),
            (["resnet8-resnet8", "at", "--device", "foo"], "found 'foo', must be auto, cpu, cuda or cuda:N"),
            (["resnet8-resnet8", "at", "--compare", "LICENSE"], "LICENSE: not what --json of this version wrote"),
        ],
    )
    def test_what_cannot_be_measured_is_one_line(self, words, line):
        with pytest.raises(UserError, match=line):
            main(words)

    def test_names_with_dashes_of_their_own_are_taken_apart(self):
        assert Pair.parse("vgg13-imagenet-vgg8-imagenet") == Pair("vgg13-imagenet", "vgg8-imagenet")


class TestPublishedCode:
    def test_is_measured_in_turn_with_our_adaptive_steps_where_it_has_a_config(self, published):
        text, results, steps = published
        assert [name for name, r in results.items() if r["published_seconds"]] == [("crd", "adaptive")]
        crd = results["crd", "adaptive"]
        row = next(line for line in text.splitlines() if line.startswith("| crd adaptive"))
        assert f"| {milliseconds(crd['published_seconds'])} " in row
        assert f"| {crd['published_seconds'] / crd['seconds']:.2f} " in row
        assert "time of a step, published code / ours" in text
        assert "published code left out: pkt adaptive, " in text
        assert "pkt/resnet8-resnet8.yml: no such file" in text
        own_steps = 1 + WARM_UP["cpu"] + 2  # to see whether it works, to warm up, and those that are measured
        assert steps.splitlines() == [f"CRD {k} (4, 3, 16, 16)" for k in range(1, own_steps + 1)]

    def test_that_fails_is_left_out_in_its_own_words(self, tmp_path, monkeypatch):
        child = tmp_path / "child.py"
        child.write_text("print('no answer before it works', file=__import__('sys').stderr)\n1 / 0\n")
        monkeypatch.setattr("utils.benchmark.published.CHILD", child)
        with pytest.raises(UserError, match=r"^ZeroDivisionError: division by zero$"):
            PublishedSteps(write_checkout(tmp_path / "checkout", str(PAIR)), PAIR, "at", SMALL)

    def test_is_left_out_in_precisions_that_it_does_not_have(self, tmp_path):
        with pytest.raises(UserError, match="it has no bf16"):
            PublishedSteps(write_checkout(tmp_path, str(PAIR)), PAIR, "at", replace(SMALL, precision="bf16"))


def test_an_earlier_run_is_compared_row_by_row_and_other_conditions_are_named(published):
    text, _, _ = published
    assert "then.json: precision was bf16, is fp32" in text
    table = text.partition("time of a step, now / then\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["kd fixed", "crd fixed", "crd adaptive"]
    assert all(float(line.split("|")[2]) > 1000 for line in table[2:])
    memory = text.partition("peak memory, now / then\n")[2].splitlines()
    assert memory[2].split("|")[2].strip() == "1.00"


def test_the_price_is_a_median_over_the_pairs_that_the_distiller_accepts():
    ratios = {("a-b", "at"): 1.0, ("c-d", "at"): 2.0, ("e-f", "at"): 9.0, ("a-b", "fsp"): 3.0}
    results = [result(pair, "kd", "fixed", bytes=2**20) for pair, _ in ratios]
    results += [result(*names, time_ratio=ratio, memory_ratio=ratio / 2, bytes=3) for names, ratio in ratios.items()]
    results += [result(pair, name, "fixed", bytes=2) for pair, name in ratios]
    results += [result("a-b", "at", share="1/4", time_ratio=5.0, bytes=1)]
    table = price_table(results)
    assert table.header == ["", "a-b", "c-d", "e-f", "median", "fixed", "memory", "memory to fixed, most"]
    assert table.rows == [
        ["kd", *["1.00 s, 1 MiB"] * 3, *[""] * 4],
        ["at", "1.00 → 5.00", "2.00 → -", "9.00 → -", "2.00 → 5.00", "1.00", "1.00 → 1.00", "1.50 → 0.50"],
        ["fsp", "3.00 → -", "-", "-", "3.00 → -", "1.00", "1.50 → -", "1.50 → -"],
    ]


def test_captured_steps_are_named_and_have_no_phases_of_eager_ones():
    table = pair_table([result(captured=True), result("a-b", "sp", phases={"data": 0.5})])
    place = list(table.header).index("steps")
    assert [row[place] for row in table.rows] == ["captured", "eager"]
    assert [row[place + 1] for row in table.rows] == ["", "50.0"]
    assert "steps" not in pair_table([result()]).header


@pytest.mark.parametrize(
    ("number", "text"), [(0.00123456, "1.23"), (0.0123456, "12.3"), (0.1234, "123"), (12.3456, "12346")]
)
def test_milliseconds_have_three_digits(number, text):
    assert milliseconds(number) == text


def test_steps_are_measured_in_turn_and_their_medians_told(monkeypatch):
    calls, times = [], {"slow": iter([2.0, 30.0, 3.0]), "fast": iter([1.0, 1.5, 50.0])}
    monkeypatch.setattr("utils.benchmark.measure.timed", lambda step, device: next(times[step()]))
    steps = [lambda: calls.append("slow") or "slow", lambda: calls.append("fast") or "fast"]
    assert seconds(steps, 3, CPU) == [3.0, 1.5]
    assert calls == ["slow", "fast"] * 3


def test_beside_plain_kd_only_one_case_is_there_at_a_time(monkeypatch):
    there, seen, refused = set(), [], Kind("fsp", "fixed")

    class Counted(SimpleNamespace):
        captured = True

        def __init__(self, pair, kind, conditions):
            if kind == refused:
                raise UserError("not this pair")
            super().__init__(name=str(kind), step=lambda: None)
            there.add(self.name)
            seen.append(sorted(there))

        def __del__(self):
            there.discard(getattr(self, "name", None))  # nameless if it refused

    monkeypatch.setattr("utils.benchmark.suite.Case", Counted)
    monkeypatch.setattr("utils.benchmark.suite.peak_memory", lambda case, device, before: 1)
    kinds = [refused, Kind("at", "fixed"), Kind("at", "adaptive"), Kind("at", "adaptive", Fraction(1, 4))]
    results = list(measure_pair(PAIR, kinds, SMALL, 1.0))
    assert [(r.distiller, r.selection, r.share) for r in results[1:]] == [
        ("at", "fixed", "1"),
        ("at", "adaptive", "1"),
        ("at", "adaptive", "1/4"),
    ]
    assert seen == [
        ["kd fixed"],
        ["kd fixed"],
        *([name, "kd fixed"] for name in ("at fixed", "at adaptive", "at adaptive 1/4")),
    ]


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


def test_a_stopwatch_gives_the_methods_back():
    class Owner:
        def work(self):
            return "done"

    owner, clock = Owner(), Stopwatch(CPU)
    module = SimpleNamespace(helper=lambda: time.sleep(0.01))
    helper = module.helper
    clock.watch(owner, "work", "work")
    clock.watch(module, "helper", "help")
    assert owner.work() == "done"
    module.helper()
    assert clock.times["help"] >= 0.01
    clock.release()
    assert "work" not in vars(owner)
    assert module.helper is helper


def test_measuring_the_phases_leaves_the_step_as_it_was():
    measured, plain = case(), case()
    torch.manual_seed(0)
    phase_seconds(measured, 2, CPU)
    measured.step()
    torch.manual_seed(0)
    for _ in range(3):
        plain.step()
    for one, other in zip(measured.task.state_dict().values(), plain.task.state_dict().values()):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("pair", "distiller"), [("wrn_16_2-wrn_16_1", "at"), ("resnet20-resnet8", "sp")])
def test_an_adaptive_step_takes_at_most_half_as_much_memory_again_as_plain_kd(pair, distiller):
    pair, conditions = Pair.parse(pair), Conditions(CPU, batch_size=16)
    peaks = []
    for name, selection in (("kd", "fixed"), (distiller, "adaptive")):
        measured = case(name, selection, conditions, pair)
        measured.step()  # momentum is there from now on
        peaks.append(peak_memory(measured, CPU, before=0))
    plain, adaptive = peaks
    assert adaptive < 1.5 * plain
