"""The captured training step: it computes what the eager one does, and its rehearsals leave no trace.

A tape takes the place of CUDA graphs (see step_tape.py); test_stand_in_gpu.py and test_gpu.py have the real ones.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from captured_steps import CPU, Training, use_optimizers_of_a_gpu
from step_tape import TapeRecorder
from toy_runs import RECIPE, assert_equal, assert_same, break_off, finish, make_engine, toy_config

from distillers import DISTILLERS
from distillers.at import AT
from utils.errors import UserError
from utils.training.meter import Meter
from utils.training.snapshot import Snapshot

# As epochs have them: smaller and larger batches at their ends.
SIZES = [8, 8, 5, 8, 5, 11]


@pytest.fixture(autouse=True, scope="module")
def _optimizers_of_a_gpu():
    with pytest.MonkeyPatch.context() as patch:
        use_optimizers_of_a_gpu(patch)
        yield


# ---- what a training may do between steps; whole runs, below, evaluate and change the learning rate


def take_all_sizes(training):
    training.take(SIZES)


def take_one_size(training):
    training.take([8, 8, 8])


def follow_the_ramp_of_the_first_epochs(training):
    for epoch in range(3):
        training.task.start_epoch(epoch)
        training.take([8, 8])


@pytest.mark.parametrize(
    ("distiller", "options", "course", "steps", "sizes"),
    [
        *((name, {}, take_one_size, 3, 1) for name in sorted(set(DISTILLERS))),
        *(("at", {"selection": name}, take_one_size, 3, 1) for name in ("anti", "fixed", "random", "shuffled")),
        ("at", {"balance": 0.01, "beta": 100.0}, take_all_sizes, len(SIZES), 3),
        (None, {}, take_all_sizes, len(SIZES), 3),
        ("crd", {"precision": "bf16"}, take_all_sizes, len(SIZES), 3),
        ("at", {"training": RECIPE}, take_one_size, 3, 1),
        ("dkd", {"warmup_epochs": 2}, follow_the_ramp_of_the_first_epochs, 6, 1),
    ],
)
def test_captured_steps_compute_what_eager_ones_do(distiller, options, course, steps, sizes):
    captured = Training(distiller, TapeRecorder(), **options)
    course(captured)
    found = captured.state()
    eager = Training(distiller, **options)
    course(eager)
    assert_equal(found, eager.state())
    # Every size is captured when it comes first, and repeated once as a proof; only the very first step is eager.
    assert (captured.recorder.recorded, captured.recorder.repeated) == (sizes, steps - 1)
    assert captured.complaints == []


# ---- giving up


class Faulty(TapeRecorder):
    """Calls something with itself after a step that it runs, before a recording ends, after a repetition."""

    def __init__(self, *, step=None, record=None, repetition=None):
        super().__init__()
        self.step, self.end, self.repetition, self.training = step, record, repetition, None

    def run(self, function):
        super().run(function)
        self._call(self.step)

    def record(self, function):
        self._call(self.end)
        repeat = super().record(function)

        def repeat_and_call():
            repeat()
            self._call(self.repetition)

        return repeat_and_call

    @torch.no_grad()
    def _call(self, fault):
        if fault:
            fault(self)


def off(change):
    """Its repetitions leave something else than the step."""
    return lambda: Faulty(repetition=lambda recorder: change(recorder.training))


def break_off_the_capture(recorder):
    raise RuntimeError(
        "CUDA error: operation not permitted\nwhen stream is capturing\n"
        "Search for `cudaErrorStreamCaptureUnsupported' in https://docs.nvidia.com for more information.\n"
    )


def run_out_of_memory(recorder):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def round_differently(recorder):
    """As kernels that add in no fixed order do: a little more and a little less in turn."""
    recorder.count = getattr(recorder, "count", 0) + 1
    recorder.training.task.student.conv1.weight.mul_(1 + 0.001 * (-1) ** recorder.count)


class Altered(AT):
    """Its losses are multiplied by `factor`. Most would go wrong if they were captured."""

    calls = 0

    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * self.factor(student, gate)


class Replaces(Altered):
    """Keeps a running mean in a buffer, but makes a new one at every step."""

    def __init__(self, setting):
        super().__init__(setting)
        self.register_buffer("center", torch.zeros(()))

    def factor(self, student, gate):
        self.center = 0.9 * self.center + 0.1 * student.detach().mean()
        return 1 + self.center


class Counts(Altered):
    """Warms up over its own steps, which Python counts."""

    def factor(self, student, gate):
        self.calls += 1
        return min(1.0, self.calls / 20)


class DrawsInPython(Altered):
    def factor(self, student, gate):
        return random.random()


class DrawsOnItsOwn(Altered):
    """From a generator that nobody else knows of, so its draws cannot be taken back."""

    generator = np.random.default_rng(3)

    def factor(self, student, gate):
        return float(self.generator.random())


def train_with(recorder, distiller="crd", sizes=(8, 8, 8)):
    training = Training(distiller, recorder)
    recorder.training = training
    return training.take(sizes)


IN_PLACE = "only what is written in place can be captured"
OTHERS = "a repetition leaves other values in "


@cache
def eager_state(distiller, *sizes):
    return Training(distiller).take(sizes).state()


def bank(training):
    return training.task.distiller.contrasts[0].student_bank.rows


@pytest.mark.parametrize(
    ("distiller", "recorder", "complaint"),
    [
        # a recorder that cannot
        (
            "at",
            lambda: Faulty(record=break_off_the_capture),
            "CUDA error: operation not permitted when stream is capturing",
        ),
        ("crd", lambda: Faulty(step=run_out_of_memory), "out of memory"),
        # distillers that would go wrong when captured
        (Replaces, Faulty, f"center of distiller is replaced at every step; {IN_PLACE}"),
        (Counts, Faulty, f"calls of distiller is replaced at every step; {IN_PLACE}"),
        (
            DrawsInPython,
            Faulty,
            "it draws from Python's random, and a captured step would draw the same numbers again and again",
        ),
        (DrawsOnItsOwn, Faulty, OTHERS),
        # captures that do something else than eager steps
        ("crd", off(lambda t: t.meter.sums[t.meter.names.index("loss/kl")].mul_(1.01)), f"{OTHERS}sums of the meter"),
        ("crd", off(lambda t: t.task.student.conv1.weight.mul_(1.001)), f"{OTHERS}the parameters"),
        (
            "crd",
            off(lambda t: t.momentum("agent").zero_()),
            f"{OTHERS}momentum_buffer of the optimiser of agent",
        ),
        ("crd", off(lambda t: bank(t).mul_(0.99)), f"{OTHERS}rows of distiller.contrasts.0.student_bank"),
        ("crd", off(lambda t: t.gates.sample_chosen[0].add_(1)), f"{OTHERS}sample_chosen of the counts of gates"),
        ("crd", off(lambda t: torch.rand(())), f"{OTHERS}the device's random generator"),
        # no excuse: eager steps do not differ from each other
        ("crd", lambda: Faulty(repetition=round_differently), f"{OTHERS}the parameters"),
    ],
)
def test_what_cannot_be_captured_is_said_in_one_line_and_trains_eagerly(distiller, recorder, complaint):
    training = train_with(recorder(), distiller, [8, 8, 5])
    ((size, line),) = training.complaints
    assert size is None
    assert line == complaint or (distiller is DrawsOnItsOwn and line.startswith(complaint))
    assert not training.step.captured
    assert training.recorder.released
    assert training.recorder.recorded <= 1, "it is not tried again"
    if distiller is not DrawsOnItsOwn:
        assert_equal(training.state(), eager_state(distiller, 8, 8, 5))
    if distiller is Counts:
        assert training.task.distiller.calls == Training(Counts).take([8, 8, 5]).task.distiller.calls


@pytest.mark.parametrize(
    ("recorder", "complaints"),
    [
        (  # for eager steps there is memory, so no other size loses its capture
            lambda: Faulty(record=lambda r: r.recorded and run_out_of_memory(r)),
            [(size, "CUDA out of memory. Tried to allocate 2.00 GiB.") for size in (5, 11)],
        ),
        (lambda: Faulty(step=lambda r: r.recorded and run_out_of_memory(r)), [(None, "out of memory")]),
    ],
)
def test_a_later_size_may_not_fit_into_memory(recorder, complaints):
    training = train_with(recorder(), sizes=SIZES)
    assert training.complaints == complaints
    assert training.step.captured is (len(complaints) == 2)
    assert_equal(training.state(), eager_state("crd", *SIZES))


def round_a_little(training):
    for tensor in (training.task.student.conv1.weight, training.momentum("student"), training.meter.sums):
        tensor.mul_(1 + 1e-7)


@pytest.mark.parametrize(
    "recorder", [off(round_a_little), lambda: Faulty(step=round_differently, repetition=round_differently)]
)
def test_captures_may_differ_by_rounding_or_as_eager_steps_differ_from_each_other(recorder):
    training = train_with(recorder())
    assert training.complaints == []
    assert training.step.captured


def test_a_number_that_first_appears_in_a_capture_is_noticed():
    layer = torch.nn.BatchNorm1d(3)
    snapshot = Snapshot([("bn", vars(layer))], CPU)
    layer.steps = 1
    assert snapshot.find_obstacle().startswith("steps of bn is replaced")


def test_a_small_loss_is_compared_apart_from_large_ones():
    meter = {"sums": torch.zeros(2, dtype=torch.float64), "finite_steps": torch.zeros(2, dtype=torch.int64)}
    before = Snapshot([("the meter", meter)], CPU)
    meter["sums"].add_(torch.tensor([0.006, 100.0]))
    meter["finite_steps"].add_(1)
    after = Snapshot([("the meter", meter)], CPU)
    assert set(after.distances(before).values()) == {0.0}
    meter["sums"][0].mul_(1.01)
    found = after.distances(before)
    assert found.pop("sums of the meter") == pytest.approx(0.01, rel=0.01)
    assert set(found.values()) == {0.0}


# ---- whole runs

CONFIG = toy_config(epochs=2, lr_decay_epochs=[1], save_every_steps=2)


def engine_of(folder, recorder, distiller="at", selection="adaptive", resume=False, config=CONFIG):
    """Its steps are captured by `recorder`, if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.training.engine.choose_recorder", lambda *arguments, **options: recorder)
        return make_engine(folder, distiller, selection, resume, config)


@pytest.mark.parametrize(
    ("distiller", "saves", "now"),
    [
        ("crd", 2, TapeRecorder()),
        ("crd", 4, None),  # the other kind of step
        ("fsp", 2, TapeRecorder()),
    ],
)
def test_runs_with_captured_steps_are_resumed_as_if_never_interrupted(tmp_path, distiller, saves, now):
    cut = engine_of(tmp_path / "cut", TapeRecorder(), distiller)
    break_off(cut, saves)
    finish(engine_of(tmp_path / "cut", now, distiller, resume=True))
    eager = engine_of(tmp_path / "eager", None, distiller)
    finish(eager)
    assert_same(cut.run, eager.run)


def test_that_steps_cannot_be_captured_is_one_line_in_the_log_unless_they_must_be(tmp_path):
    engine = engine_of(tmp_path / "auto", Faulty(record=break_off_the_capture))
    finish(engine)
    line = "steps of train run eagerly, not as one CUDA graph: CUDA error: operation not permitted when stream is"
    assert engine.run.log.read_text().count(f"{line} capturing\n") == 1
    engine = engine_of(tmp_path / "true", Faulty(record=break_off_the_capture), config=toy_config(cuda_graph=True))
    with pytest.raises(UserError, match=r"cuda_graph: true, but train cannot be captured: CUDA error: .*; auto"):
        finish(engine)


def test_the_first_step_that_is_not_finite_is_found_with_the_losses_that_broke_in_it(monkeypatch):
    meter, other = Meter(CPU), Meter(CPU)
    good, bad = {"ce": torch.ones(()), "kl": torch.ones(())}, {"ce": torch.ones(()), "kl": torch.tensor(torch.nan)}
    meter.add(good, 4)
    state = meter.state_dict()
    other.load_state_dicts([state])  # resumed within the epoch
    for values in (good, bad, dict.fromkeys(good, torch.tensor(torch.inf))):
        meter.add(values, 4)
        other.add(good, 4)
    assert meter.first_bad_step() == (3, ["kl"])
    monkeypatch.setattr("utils.training.meter.gather_objects", lambda own: [other.finite_steps.tolist(), own])
    assert meter.first_bad_step() == (3, ["kl"])
    assert other.finite_steps.tolist() == [4, 4]
    with pytest.raises(UserError, match="must log the same values, but ce is new or missing"):
        meter.add({"kl": torch.ones(())}, 4)
