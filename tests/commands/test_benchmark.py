"""The benchmark measures what it says it measures."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from utils.benchmark.__main__ import main, summary_table
from utils.benchmark.cases import Case, Conditions, Pair, make_teacher
from utils.benchmark.measure import Stopwatch, lasting_bytes, peak_memory, phase_seconds, seconds
from utils.benchmark.suite import Result, step_seconds
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = Conditions(CPU, batch_size=4, size=16, num_classes=10, samples=60)
PAIR = Pair("resnet8", "resnet8")


def case(distiller="at", selection="adaptive", conditions=SMALL, pair=PAIR):
    return Case(pair, distiller, selection, make_teacher(pair, conditions), conditions)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    small = ["--batch-size", "4", "--size", "16", "--samples", "400", "--rounds", "2", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **options: printed.append(" ".join(map(str, words))))
        assert main(["resnet8-resnet8,vgg8-resnet8", "fsp,crd", *small, "--json", str(file)]) == 0
    return json.loads(file.read_text()), "\n".join(printed)


class TestCommand:
    def test_every_case_is_there_and_plain_kd_is_the_unit(self, report):
        results = report[0]["results"]
        names = [(r["pair"], r["distiller"], r["selection"]) for r in results]
        both = [("kd", "fixed"), ("fsp", "fixed"), ("fsp", "adaptive"), ("crd", "fixed"), ("crd", "adaptive")]
        assert names[:5] == [("resnet8-resnet8", *case) for case in both]
        assert names[5:] == [("vgg8-resnet8", *case) for case in both if case[0] != "fsp"]  # unequal widths
        for r in results:
            unit = next(u for u in results if u["pair"] == r["pair"] and u["distiller"] == "kd")
            assert r["time_ratio"] == pytest.approx(r["seconds"] / unit["seconds"])
            assert r["memory_ratio"] == pytest.approx(r["bytes"] / unit["bytes"])
            assert r["images_per_second"] == pytest.approx(4 / r["seconds"])

    def test_the_phases_are_the_whole_step_and_routing_is_the_policys_alone(self, report):
        for r in report[0]["results"]:
            assert sum(r["phases"].values()) == pytest.approx(1)
            assert min(r["phases"].values()) > 0
            parts = {"data", "teacher", "student", "backward", "optimisers", "rest"}
            assert r["phases"].keys() == parts | ({"routing"} if r["selection"] == "adaptive" else set())

    def test_the_tables_and_the_machine_are_printed(self, report):
        figures, text = report
        assert f"PyTorch {torch.__version__}; fp32, batch 4, 16x16 pixels, median of 2 steps" in text
        assert "| crd adaptive |" in text
        assert "adaptive step / plain KD step" in text
        assert "peak memory, adaptive / plain KD" in text
        assert figures["conditions"]["samples"] == 400
        assert f"{figures['loaders']['memory']:,.0f} images/s per core" in text

    def test_what_cannot_be_measured_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match="resnet8-resnet9: no such pair; expected <teacher>-<student>"):
            main(["resnet8-resnet9"])
        with pytest.raises(UserError, match="unknown distiller 'ta'"):
            main(["resnet8-resnet8", "ta"])

    def test_names_with_dashes_of_their_own_are_taken_apart(self):
        assert Pair.parse("vgg13-imagenet-vgg8-imagenet") == Pair("vgg13-imagenet", "vgg8-imagenet")


def test_the_summary_takes_the_median_over_the_pairs_that_the_distiller_accepts():
    def result(pair, distiller, ratio):
        return Result(pair, distiller, "adaptive", 1.0, 1.0, 1, ratio, 1.0)

    results = [result("a-b", "at", 1.0), result("c-d", "at", 2.0), result("e-f", "at", 9.0), result("a-b", "fsp", 3.0)]
    at, fsp = ["at", "1.00", "2.00", "9.00", "2.00"], ["fsp", "3.00", "", "", "3.00"]
    assert summary_table(results, "time_ratio").rows == [at, fsp]


def test_steps_are_measured_in_turn_and_their_medians_told(monkeypatch):
    calls, times = [], {"slow": iter([2.0, 30.0, 3.0]), "fast": iter([1.0, 1.5, 50.0])}
    monkeypatch.setattr("utils.benchmark.measure.timed", lambda step, device: next(times[step()]))
    steps = [lambda: calls.append("slow") or "slow", lambda: calls.append("fast") or "fast"]
    assert seconds(steps, 3, CPU) == [3.0, 1.5]
    assert calls == ["slow", "fast"] * 3


def test_plain_kd_is_measured_between_the_others_and_all_its_times_count(monkeypatch):
    calls, plain = [], iter([5.0, 1.0, 2.0, 7.0])
    cases = [SimpleNamespace(step=lambda k=k: calls.append(k) or k) for k in range(7)]
    monkeypatch.setattr(
        "utils.benchmark.measure.timed", lambda step, device: 10.0 * k if (k := step()) else next(plain)
    )
    assert step_seconds(cases, 2, CPU, "pair") == [3.5, 10, 20, 30, 40, 50, 60]
    assert calls == [0, 1, 2, 3, 4, 0, 5, 6] * 2


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
    assert peak_memory(fake, CPU) == pytest.approx((6 + 4) * 2**20, rel=1e-3)


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
        peaks.append(peak_memory(measured, CPU))
    plain, adaptive = peaks
    assert adaptive < 1.5 * plain
