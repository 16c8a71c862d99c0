"""The captured training step: it computes what the eager one does, and its rehearsals leave no trace.

A tape takes the place of CUDA graphs (see step_tape.py); test_stand_in_gpu.py and test_gpu.py have the real ones.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from process_runs import config_file, prepare
from step_tape import TapeRecorder
from torch import nn
from toy_runs import (
    EPOCHS,
    STEPS,
    PowerCut,
    assert_equal,
    cut_power_after,
    finish,
    gate_records,
    make_engine,
    records,
    toy_config,
)
from toys import NUM_CLASSES, NUM_SAMPLES, ToyNet, toy_batch, toy_task

import utils.training.optim
from distillers import DISTILLERS
from distillers.at import AT
from distillers.task import Classification
from utils.config import load_config
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.device import rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.run import train
from utils.training.snapshot import Place, Snapshot
from utils.training.step import Phase, make_step

CPU = torch.device("cpu")
# As epochs have them: smaller and larger batches at their ends.
SIZES = [8, 8, 8, 5, 8, 8, 8, 5, 8, 11]


@pytest.fixture(autouse=True)
def _optimizers_of_a_gpu(monkeypatch):
    """Learning rates in tensors, and kernels that read them there: what a tape needs as much as a graph."""

    def sgd(parameters, lr, momentum, weight_decay):
        how = utils.training.optim._on_gpu(lr, parameters[0].device)
        return torch.optim.SGD(parameters, **how, momentum=momentum, weight_decay=weight_decay)

    monkeypatch.setattr(utils.training.optim, "_sgd", sgd)


class Training:
    """A task with everything that a step needs; the same arguments give the same numbers."""

    def __init__(self, task=None, recorder=None, precision="fp32"):
        self.config = toy_config()
        self.task = task if task is not None else toy_task()
        self.optimizers = make_optimizers(self.task.parameter_groups(), self.config)
        self.meter = Meter(CPU)
        self.gates = GateRecorder(list(self.task.gate_labels), NUM_CLASSES, NUM_SAMPLES, CPU)
        self.complaints: list[str] = []
        self.recorder = recorder
        self.step = make_step(
            Phase("train", self.task, EPOCHS, self.optimizers),
            self.meter,
            self.gates,
            lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
            recorder,
            self.complaints.append,
        )
        torch.manual_seed(11)

    def take(self, sizes, first_seed=0):
        for seed, size in enumerate(sizes, first_seed):
            self.step(toy_batch(size, seed=seed))
        return self

    def state(self):
        """Everything that one step leaves to the next, as plain values."""
        state = {
            "task": self.task.state_dict(),
            "optimizers": {name: item.state_dict() for name, item in self.optimizers.items()},
            "meter": self.meter.state_dict(),
            "gates": self.gates.state_dict(),
            "random": rng_state(CPU),
        }
        return copied(state)


def copied(value):
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


class TestCaptured:
    def check(self, make_task, **options):
        captured = Training(make_task(), TapeRecorder(), **options).take(SIZES)
        eager = Training(make_task(), **options).take(SIZES)
        assert_equal(captured.state(), eager.state())
        # Every size is captured when it comes first, and repeated once as a proof; only the very first step is eager.
        assert (captured.recorder.recorded, captured.recorder.repeated) == (len(set(SIZES)), len(SIZES) - 1)
        assert captured.complaints == []

    @pytest.mark.parametrize("distiller", sorted(set(DISTILLERS)))
    def test_computes_what_eager_steps_do_under_every_distiller(self, distiller):
        self.check(lambda: toy_task(distiller))

    @pytest.mark.parametrize("selection", ["anti", "fixed", "random"])
    def test_computes_what_eager_steps_do_under_every_selection(self, selection):
        self.check(lambda: toy_task("at", selection=selection))

    def test_computes_what_eager_steps_do_without_a_teacher(self):
        def network():
            torch.manual_seed(0)
            return Classification(ToyNet()).train()

        self.check(network)

    def test_computes_what_eager_steps_do_in_half_precision(self):
        self.check(lambda: toy_task("crd"), precision="bf16")

    def test_may_begin_with_the_last_batch_of_an_epoch(self):
        """As it does after a resumption; the first step is the one that is not captured."""
        training = Training(recorder=TapeRecorder()).take([5, 8, 8, 5, 5])
        assert (training.recorder.recorded, training.recorder.repeated) == (2, 4)
        assert_equal(training.state(), Training().take([5, 8, 8, 5, 5]).state())

    def test_follows_the_learning_rate(self):
        def train(recorder):
            training = Training(recorder=recorder)
            for epoch in range(EPOCHS):
                for optimizer in training.optimizers.values():
                    optimizer.start_epoch(epoch)
                training.take([8, 8, 8], first_seed=3 * epoch)
            return training

        captured, eager = train(TapeRecorder()), train(None)
        assert captured.recorder.repeated == 3 * EPOCHS - 1  # a proof instead of the first one
        assert captured.optimizers["student"].state_dict()["param_groups"][0]["lr"] == pytest.approx(0.0005)
        assert_equal(captured.state(), eager.state())

    def test_follows_the_ramp_of_the_first_epochs(self):
        def train(recorder):
            training = Training(toy_task("dkd", warmup_epochs=2), recorder)
            for epoch in range(EPOCHS):
                training.task.start_epoch(epoch)
                training.take([8, 8], first_seed=2 * epoch)
            return training

        captured, eager = train(TapeRecorder()), train(None)
        assert captured.recorder.recorded == 1
        assert captured.recorder.repeated == 2 * EPOCHS - 1
        assert_equal(captured.state(), eager.state())

    def test_counts_on_after_the_meter_and_the_gates_are_reset(self):
        def train(recorder):
            training = Training(recorder=recorder).take([8, 8, 8])
            training.meter.reset()
            training.gates.reset()
            assert training.meter.means() == {}
            assert training.meter.state_dict() == Meter(CPU).state_dict()
            return training.take([8, 8], first_seed=3)

        captured, eager = train(TapeRecorder()), train(None)
        assert captured.meter.means() == eager.meter.means()
        assert captured.meter.count == 16
        assert_equal(captured.state(), eager.state())

    def test_may_be_followed_by_evaluation_and_further_steps(self):
        def train(recorder):
            training = Training(recorder=recorder).take([8, 8, 8])
            student = training.task.student
            with torch.inference_mode():
                logits = student.eval()(toy_batch(7).image)
            student.train()
            return training.take([8, 8], first_seed=3), logits.clone()

        (captured, seen), (eager, expected) = train(TapeRecorder()), train(None)
        assert torch.equal(seen, expected)
        assert_equal(captured.state(), eager.state())


class Failing(TapeRecorder):
    """Rehearses like the others and fails then."""

    def record(self, function):
        super().record(function)
        raise RuntimeError(
            "CUDA error: operation not permitted\nwhen stream is capturing\n"
            "Search for `cudaErrorStreamCaptureUnsupported' in https://docs.nvidia.com for more information.\n"
        )


class Full(TapeRecorder):
    """The GPU's memory is full as soon as a batch of another size than the first one comes."""

    released = False

    def run(self, function):
        super().run(function)
        if self.recorded:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def release(self):
        self.released = True


class Off(TapeRecorder):
    """Its repetitions are followed by `error`, called with the training."""

    def __init__(self, error):
        super().__init__()
        self.error, self.training = error, None

    def record(self, function):
        repeat = super().record(function)

        def repeat_and_err():
            repeat()
            with torch.no_grad():
                self.error(self.training)

        return repeat_and_err


class Waits(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * (1 if gate.sum().item() else 0)


class Replaces(AT):
    """Keeps a running mean in a buffer, but makes a new one at every step."""

    def __init__(self, setting):
        super().__init__(setting)
        self.register_buffer("center", torch.zeros(()))

    def spot_loss(self, k, student, teacher, gate, batch):
        self.center = 0.9 * self.center + 0.1 * student.detach().mean()
        return super().spot_loss(k, student, teacher, gate, batch) * (1 + self.center)


class Counts(AT):
    """Warms up over its own steps, which Python counts."""

    def __init__(self, setting):
        super().__init__(setting)
        self.steps = 0

    def spot_loss(self, k, student, teacher, gate, batch):
        self.steps += 1
        return super().spot_loss(k, student, teacher, gate, batch) * min(1.0, self.steps / 20)


class Remembers(AT):
    """Keeps a tensor that is no buffer."""

    def __init__(self, setting):
        super().__init__(setting)
        self.before = torch.zeros(())

    def spot_loss(self, k, student, teacher, gate, batch):
        loss = super().spot_loss(k, student, teacher, gate, batch)
        loss, self.before = loss + self.before, loss.detach()
        return loss


class DrawsInPython(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * random.random()


class DrawsInNumPy(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * np.random.rand()  # noqa: NPY002


class DrawsOnItsOwn(AT):
    """From a generator that nobody else knows of."""

    def __init__(self, setting):
        super().__init__(setting)
        self.generator = np.random.default_rng(3)

    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * float(self.generator.random())


IN_PLACE = "only what is written in place can be captured"
SAME_NUMBERS = "and a captured step would draw the same numbers again and again"


class TestGivingUp:
    def test_leaves_the_step_as_it_was_taken_eagerly(self):
        training = Training(toy_task("crd"), Failing()).take([8])
        tensors = [tensor.data_ptr() for tensor in training.task.state_dict().values()]
        training.take([8], first_seed=1)
        assert_equal(training.state(), Training(toy_task("crd")).take([8, 8]).state())
        assert [tensor.data_ptr() for tensor in training.task.state_dict().values()] == tensors

    def test_says_why_in_one_line_and_does_not_try_again(self):
        training = Training(recorder=Failing()).take(SIZES)
        assert training.complaints == ["CUDA error: operation not permitted when stream is capturing"]
        assert training.recorder.recorded == 1
        assert_equal(training.state(), Training().take(SIZES).state())

    @pytest.mark.parametrize(
        ("distiller", "complaint"),
        [
            (Waits, "aten._local_scalar_dense.default would wait for the device"),
            (Replaces, f"center of distiller is replaced at every step; {IN_PLACE}"),
            (Counts, f"steps of distiller is replaced at every step; {IN_PLACE}"),
            (Remembers, f"before of distiller is replaced at every step; {IN_PLACE}"),
            (DrawsInPython, f"it draws from Python's random, {SAME_NUMBERS}"),
            (DrawsInNumPy, f"it draws from NumPy's global generator, {SAME_NUMBERS}"),
            (DrawsOnItsOwn, "a repetition leaves other values in "),
        ],
    )
    def test_is_for_distillers_that_would_go_wrong_when_captured(self, distiller, complaint):
        training, eager = (
            seeded(lambda recorder=recorder: Training(toy_task(distiller), recorder).take(SIZES))
            for recorder in (TapeRecorder(), None)
        )
        assert [line[: len(complaint)] for line in training.complaints] == [complaint]
        assert not training.step.captured
        if distiller is not DrawsOnItsOwn:  # whose draws cannot be taken back
            assert_equal(training.state(), eager.state())
        if distiller is Counts:
            assert training.task.distiller.steps == eager.task.distiller.steps

    @pytest.mark.parametrize(
        ("error", "complaint"),
        [
            (lambda t: t.meter.sums[t.meter.names.index("loss/kl")].mul_(1.01), "leaves other values in loss/kl"),
            (lambda t: t.task.student.conv1.weight.mul_(1.001), "leaves other values in the parameters"),
            (lambda t: momentum(t, "student").mul_(1.01), "leaves other values in the optimiser of student"),
            (lambda t: momentum(t, "agent").zero_(), "leaves other values in the optimiser of agent"),
            (lambda t: bank(t).mul_(0.99), "leaves other values in distiller.contrasts.0.student_bank"),
            (lambda t: t.task.student.bn1.running_var.mul_(1.01), "leaves other values in student.bn1"),
            (lambda t: t.gates.sample_chosen[0].add_(1), "leaves other values in the counts of gates"),
            (lambda t: torch.rand(()), "draws another amount of random numbers"),
        ],
    )
    def test_is_for_captures_that_do_something_else_than_eager_steps(self, error, complaint):
        training = Training(toy_task("crd"), Off(error))
        training.recorder.training = training
        training.take(SIZES)
        assert training.complaints == [f"a repetition {complaint}"]
        assert not training.step.captured
        assert_equal(training.state(), Training(toy_task("crd")).take(SIZES).state())

    def test_is_not_for_captures_that_round_differently(self):
        def error(training):
            for tensor in (training.task.student.conv1.weight, momentum(training, "student"), training.meter.sums):
                tensor.mul_(1 + 1e-7)

        training = Training(toy_task("crd"), Off(error))
        training.recorder.training = training
        training.take([8, 8, 8])
        assert training.complaints == []
        assert training.step.captured

    def test_is_for_memory_that_is_too_small_for_captures_but_not_for_the_step(self):
        training = Training(toy_task("crd"), Full()).take(SIZES)
        assert training.complaints == ["out of memory"]
        assert training.recorder.released
        assert not training.step.captured
        assert_equal(training.state(), Training(toy_task("crd")).take(SIZES).state())

    def test_hides_no_error_of_the_step_itself(self):
        class Breaks(AT):
            def spot_loss(self, k, student, teacher, gate, batch):
                if batch.label[0] == toy_batch(8, seed=1).label[0]:
                    raise ValueError("a mistake")
                return super().spot_loss(k, student, teacher, gate, batch)

        with pytest.raises(ValueError, match="a mistake"):
            Training(toy_task(Breaks), TapeRecorder()).take([8, 8])


def seeded(function):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    return function()


def momentum(training, name):
    state = training.optimizers[name].optimizer.state
    return state[training.optimizers[name].optimizer.param_groups[0]["params"][0]]["momentum_buffer"]


def bank(training):
    return training.task.distiller.contrasts[0].student_bank.rows


class TestSnapshot:
    def test_restores_in_place_so_that_the_students_twin_follows(self):
        task = toy_task()
        twin = task._twin[0]
        expected = twin.conv1.weight.clone()
        snapshot = Snapshot([Place("", module._parameters) for module in task.modules()], CPU)
        with torch.no_grad():
            task.student.conv1.weight.zero_()
        assert not twin.conv1.weight.any()
        snapshot.restore()
        assert torch.equal(twin.conv1.weight, expected)

    def test_puts_back_what_was_replaced(self):
        module = nn.BatchNorm1d(3)
        mean = module.running_mean
        snapshot = Snapshot([Place("bn", vars(module)), Place("bn", module._buffers)], CPU)
        module.running_mean, module.eps = torch.ones(3), 7.0
        assert snapshot.find_replaced().startswith("eps of bn is replaced")
        snapshot.restore()
        assert module.running_mean is mean
        assert module.eps == 1e-5
        assert snapshot.find_replaced() == ""

    def test_notices_what_is_new(self):
        place = {}
        snapshot = Snapshot([Place("it", place)], CPU)
        place["steps"] = 1
        assert snapshot.find_replaced().startswith("steps of it is replaced")


@pytest.fixture
def captured(monkeypatch):
    """Engines capture their steps, from now on; what does it."""
    recorder = TapeRecorder()
    use(monkeypatch, recorder)
    return recorder


def use(monkeypatch, recorder):
    monkeypatch.setattr("utils.training.engine.choose_recorder", lambda *arguments, **options: recorder)


def outcome(run):
    gates = gate_records(run) if run.gates.exists() else None
    return {"last": read_checkpoint(run.last), "best": read_checkpoint(run.best), "records": records(run), "g": gates}


class TestRuns:
    @pytest.mark.parametrize(
        ("distiller", "selection"),
        [(None, ""), ("at", "anti"), ("crd", "adaptive"), ("fsp", "random"), ("ft", "fixed")],
    )
    def test_end_the_same_with_captured_steps(self, tmp_path, monkeypatch, distiller, selection):
        engines = []
        for recorder in (None, TapeRecorder()):
            use(monkeypatch, recorder)
            torch.manual_seed(0)
            engines.append(make_engine(tmp_path / str(len(engines)), distiller, selection))
            finish(engines[-1])
        assert_equal(outcome(engines[1].run), outcome(engines[0].run))
        phases, epochs = len(engines[0].phases), sum(phase.epochs for phase in engines[0].phases)
        assert recorder.recorded == phases
        assert recorder.repeated == epochs * STEPS - phases  # a proof instead of the first one

    @pytest.mark.parametrize(("distiller", "saves"), [("at", 1), ("at", 4), ("crd", 2), ("fsp", 2), ("fsp", 6)])
    def test_are_resumed_as_if_never_interrupted(self, tmp_path, captured, distiller, saves):
        config = toy_config(save_every_steps=2)
        whole = make_engine(tmp_path / "whole", distiller, config=config)
        finish(whole)
        cut = make_engine(tmp_path / "cut", distiller, config=config)
        cut_power_after(cut, saves)
        with pytest.raises(PowerCut):
            finish(cut)
        torch.manual_seed(99)  # a new process has another random state
        finish(make_engine(tmp_path / "cut", distiller, resume=True, config=config))
        assert_equal(outcome(cut.run), outcome(whole.run))

    def test_may_be_resumed_with_the_other_kind_of_step(self, tmp_path, monkeypatch):
        config = toy_config(save_every_steps=2)
        use(monkeypatch, None)
        whole = make_engine(tmp_path / "whole", config=config)
        finish(whole)
        use(monkeypatch, TapeRecorder())
        cut = make_engine(tmp_path / "cut", config=config)
        cut_power_after(cut, 4)
        with pytest.raises(PowerCut):
            finish(cut)
        use(monkeypatch, None)
        finish(make_engine(tmp_path / "cut", resume=True, config=config))
        assert_equal(outcome(cut.run), outcome(whole.run))

    def test_say_once_that_their_steps_cannot_be_captured(self, tmp_path, monkeypatch):
        use(monkeypatch, Failing())
        engine = make_engine(tmp_path / "run")
        finish(engine)
        line = "steps of train run eagerly, not as one CUDA graph: CUDA error: operation not permitted when stream is"
        assert engine.run.log.read_text().count(f"{line} capturing\n") == 1

    def test_end_if_their_steps_cannot_be_captured_but_must_be(self, tmp_path, monkeypatch):
        engine = make_engine(tmp_path / "run", config=toy_config())
        engine.config = toy_config(cuda_graph=True)
        engine._recorder = Failing()
        with pytest.raises(
            UserError, match=r"cuda_graph: true, but train cannot be captured: CUDA error: .*capturing; auto"
        ):
            finish(engine)

    def test_that_must_be_captured_and_cannot_are_refused_before_anything_is_overwritten(self, tmp_path):
        config = load_config(config_file(prepare(tmp_path), training={"cuda_graph": True}))
        checkpoint = RunDir(config.run_dir).last
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        with pytest.raises(UserError, match=r"^training.cuda_graph: true, but this is the cpu; auto makes a graph"):
            train(config, overwrite=True)
        assert checkpoint.exists()

    def test_say_nothing_on_a_cpu(self, tmp_path):
        engine = make_engine(tmp_path / "run")
        finish(engine)
        assert "graph" not in engine.run.log.read_text()
