"""Training on two real processes: equal copies, true gradients, one set of files, and a common end."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing, nn
from toy_runs import (
    PowerCut,
    assert_equal,
    cut_power_after,
    finish,
    gate_records,
    phases_of,
    records,
    toy_config,
)
from toys import NUM_CLASSES, NUM_SAMPLES, ToyNet, toy_batch, toy_data, toy_task

from datasets.batch import Batch
from distillers.crd import Contrast
from distillers.pretraining import Pretraining
from distillers.task import Classification
from utils.cli import main_distill
from utils.errors import UserError
from utils.launch import main as launcher_main
from utils.processes.group import (
    Agreement,
    Replica,
    all_sum,
    from_main,
    gather_objects,
    gather_rows,
    is_main,
    main_first,
    process_group,
    rank,
    world_size,
)
from utils.processes.stopping import EXIT_INTERRUPTED, NOTHING_TO_SAVE, Interrupted
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.build import synchronize_batchnorm
from utils.training.device import choose_device, set_up
from utils.training.engine import Engine, evaluate
from utils.training.gate_counts import GateRecorder

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PATIENCE = 60  # seconds


class Pair:
    """Two processes in one group, which run the functions that they are told to."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for number in range(2):
            here, there = context.Pipe()
            self.pipes.append(here)
            self.processes.append(context.Process(target=_obey, args=(there, number, port), daemon=True))
            self.processes[-1].start()

    def send(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return self._answers()

    def _answers(self):
        answers = {}
        while len(answers) < 2:
            ready = wait([pipe for pipe in self.pipes if pipe not in answers], PATIENCE)
            assert ready, "the two processes wait for each other"
            for pipe in ready:
                answers[pipe], problem = pipe.recv()
                assert problem is None, problem
        return [answers[pipe] for pipe in self.pipes]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


def _obey(pipe, number, port):
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    with process_group(CPU):
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send((function(*arguments), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


@pytest.fixture(scope="module")
def started():
    pairs = []
    yield pairs
    for pair in pairs:
        pair.end()


@pytest.fixture
def on_both(started):
    """Call a function of this module on two processes; a list of what it gives on each."""
    if not started:
        started.append(Pair())

    def call(function, *arguments):
        try:
            return started[0].send(function, *arguments)
        except BaseException:
            started.pop().end()  # the next test gets two that know what they are doing
            raise

    return call


def shard_of(batch: Batch, number: int) -> Batch:
    return Batch(*(part[number::2] for part in batch))


class TestMessages:
    def test_say_who_is_there(self, on_both):
        assert on_both(everybody) == [(0, 2, True, [0, 1], "of 0"), (1, 2, False, [0, 1], "of 0")]
        assert everybody() == (0, 1, True, [0], "of 0")

    def test_add_tensors(self, on_both):
        for total, scalar in on_both(sums):
            assert total.tolist() == [[3.0, 3.0]]
            assert scalar.item() == 30.0

    def test_join_rows_of_unequal_numbers_in_order(self, on_both):
        for index, rows in on_both(unequal_rows):
            assert index.tolist() == [0, 1, 2, 10, 11]
            assert torch.equal(rows, index[:, None] * torch.ones(2))

    def test_agree_one_step_after_one_process_asks(self, on_both):
        assert on_both(ask) == [[False, False, False, True]] * 2

    def test_let_the_first_process_go_ahead(self, on_both, tmp_path):
        assert on_both(go_first, tmp_path / "file") == ["wrote", "found"]


def everybody():
    return rank(), world_size(), is_main(), gather_objects(rank()), from_main(f"of {rank()}")


def sums():
    mine = rank() + 1.0
    return all_sum(torch.full((1, 2), mine), torch.tensor(10 * mine))


def unequal_rows():
    index = torch.arange(3 - rank()) + 10 * rank()
    return gather_rows(index, index[:, None] * torch.ones(2))


def ask():
    agreed = Agreement()
    return [agreed(rank() == 1 and step == 2) for step in range(4)]


def go_first(path):
    with main_first():
        if path.exists():
            return "found"
        time.sleep(0.2)
        path.touch()
        return "wrote"


class TestGradients:
    @pytest.mark.parametrize(
        ("distiller", "selection", "phase"),
        [
            ("at", "adaptive", "train"),
            ("at", "anti", "train"),
            ("fitnet", "random", "train"),
            ("sp", "adaptive", "train"),
            ("crd", "adaptive", "train"),
            ("kd", "adaptive", "train"),
            ("ft", "adaptive", "pretrain"),
            ("ft", "adaptive", "train"),
            ("fsp", "fixed", "pretrain"),
            ("fsp", "fixed", "train"),
        ],
    )
    def test_are_the_average_of_those_of_the_two_parts(self, on_both, distiller, selection, phase):
        (found, expected), (found_too, _) = on_both(both_gradients, distiller, selection, phase)
        assert found.keys() == expected.keys() == found_too.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], found_too[name]), name
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest(expected), msg=name)

    def test_are_so_to_the_last_digits_in_double_precision_for_parts_of_unequal_size(self, on_both):
        found, expected = on_both(both_gradients, "fitnet", "random", "train", 7, torch.float64)[0]
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-14 * largest(expected), msg=name)

    def test_of_the_policys_quota_count_the_whole_batch(self, on_both):
        """Were it averaged like a mean, two processes would ask for half as much as one."""
        found, alone = on_both(quota_gradients)[0]
        torch.testing.assert_close(found, alone)


def largest(gradients):
    return max(gradient.abs().max().item() for gradient in gradients.values())


def make_task(distiller, selection, phase, dtype=torch.float32):
    task = toy_task(distiller, selection=selection)
    if distiller == "crd":
        for contrast in task.distiller.contrasts:  # that two processes find Z together is another test's business
            contrast.student_bank.normalizer.fill_(30.0)
            contrast.teacher_bank.normalizer.fill_(40.0)
    if phase == "pretrain":
        task = Pretraining(task.student, task.teacher, task.distiller).train()
    trained = [parameter for group in task.parameter_groups().values() for parameter in group]
    return task.to(dtype), trained


def gradients_of(task, trained):
    wanted = {id(parameter) for parameter in trained}
    return {name: p.grad.clone() for name, p in task.named_parameters() if id(p) in wanted}


def gradients_on_part(number, task, trained, batch, replica=None):
    torch.manual_seed(100 + number)  # the gates' noise
    for output in task(shard_of(batch, number)):
        output.loss.backward()
        if replica:
            replica.send_gradients()
    if replica:
        replica.receive_gradients()
    return gradients_of(task, trained)


def both_gradients(distiller, selection, phase, size=8, dtype=torch.float32):
    """Those that two processes find together, and the mean of those that one finds on either part."""
    batch = toy_batch(size)
    batch = batch._replace(image=batch.image.to(dtype))
    task, trained = make_task(distiller, selection, phase, dtype)
    together = gradients_on_part(rank(), task, trained, batch, Replica(task, trained))
    apart = []
    for number in range(2):
        task, trained = make_task(distiller, selection, phase, dtype)
        apart.append(gradients_on_part(number, task, trained, batch))
    return together, {name: (apart[0][name] + apart[1][name]) / 2 for name in apart[0]}


def quota_gradients():
    from distillers.spot_adaptive.distillation import routing_loss

    gates = torch.zeros(8, dtype=torch.float64, requires_grad=True)  # nobody is distilled
    zero = torch.zeros((), dtype=torch.float64)
    routing_loss(zero, zero, gates[rank() :: 2], 1.0, processes=2).backward()
    average = all_sum(gates.grad)[0] / world_size()
    return average, torch.full_like(gates, -1.0)


class TestTraining:
    @pytest.mark.parametrize(
        ("distiller", "selection"), [(None, None), ("fitnet", "anti"), ("crd", "adaptive"), ("ft", "random")]
    )
    def test_leaves_all_processes_with_the_same_weights_statistics_and_banks(
        self, on_both, tmp_path, distiller, selection
    ):
        first, second = on_both(train, tmp_path / "run", distiller, selection)
        assert_equal(second["state"], first["state"])
        assert not torch.equal(first["rng"], second["rng"])
        if distiller == "crd":
            fresh = toy_task("crd", seed=1029).state_dict()["distiller.contrasts.0.student_bank.rows"]
            moved = first["state"]["distiller.contrasts.0.student_bank.rows"] != fresh
            assert moved.any(dim=1).float().mean() > 0.5

    def test_writes_everything_once(self, on_both, tmp_path):
        on_both(train, tmp_path / "run", "at", "adaptive")
        run = RunDir(tmp_path / "run")
        assert [record["epoch"] for record in records(run)] == [1, 2, 3]
        assert [record["global_epoch"] for record in gate_records(run)] == [1, 2, 3]
        assert len(run.event_files()) == 1
        assert run.log.read_text().count("train 3/3 | loss") == 1

    def test_counts_every_sample_once(self, on_both):
        parts, validation = zip(*on_both(epoch_of_indices))
        assert sorted(parts[0] + parts[1]) == list(range(NUM_SAMPLES))
        assert sorted(validation[0] + validation[1]) == list(range(NUM_SAMPLES))
        order = [int(index) for batch in toy_data(batch_size=7).train.epoch(3) for index in batch.index]
        assert sorted(order[:7]) == sorted(parts[0][:4] + parts[1][:3])  # the global batch is that of one process

    def test_evaluates_like_a_single_process(self, on_both):
        alone = accuracy()
        for together in on_both(accuracy):
            assert together == pytest.approx(alone, rel=1e-6)

    def test_records_the_gates_of_all_samples(self, on_both):
        alone, (shares, samples) = count_gates(), on_both(count_gates)[0]
        assert shares == alone[0]
        assert torch.equal(samples, alone[1])

    def test_moves_the_banks_and_finds_the_normaliser_as_a_single_process_would(self, on_both):
        alone = contrast_state()
        for together in on_both(contrast_state):
            torch.testing.assert_close(together, alone)


def make_engine(folder, distiller, selection, resume=False, save_every_steps=None):
    config = toy_config(save_every_steps=save_every_steps)
    set_up(config)
    if distiller is None:
        task = Classification(ToyNet())
    else:
        task = toy_task(distiller, seed=config.training.seed, selection=selection)
    run = RunDir(folder)
    checkpoint = from_main(run.open(resume=resume, overwrite=False) if is_main() else None)
    return Engine(phases_of(task, config), toy_data(shard=(rank(), world_size())), run, config, CPU).start(checkpoint)


def train(*arguments):
    engine = make_engine(*arguments)
    finish(engine)
    return {"state": engine.task.state_dict(), "rng": torch.get_rng_state()}


def epoch_of_indices():
    data = toy_data(batch_size=7, shard=(rank(), world_size()))
    return tuple(
        [int(index) for batch in loader.epoch(epoch) for index in batch.index]
        for loader, epoch in ((data.train, 3), (data.val, 0))
    )


def accuracy():
    torch.manual_seed(0)
    data = toy_data(batch_size=7, shard=(rank(), world_size()))
    return evaluate(ToyNet(), data.val, CPU, lambda: torch.autocast("cpu", enabled=False))


def count_gates():
    """Two epochs of known gates, collected within the second; other gates at every visit of a sample."""
    recorder = GateRecorder(["f1", "logits"], NUM_CLASSES, NUM_SAMPLES, CPU)
    loader = toy_data(shard=(rank(), world_size())).train
    for epoch in range(2):
        recorder.reset()
        for step, batch in enumerate(loader.epoch(epoch)):
            recorder.add(torch.stack([batch.index % 3 == epoch, batch.index % 2 == epoch], dim=1).float(), batch)
            if epoch == 1 and step == 2:
                recorder.collect()
        recorder.collect()
    return recorder.shares(), recorder.sample_chosen


def contrast_state():
    """Banks and normalisers after two batches of seven, which two processes share unequally."""
    torch.manual_seed(0)
    contrast = Contrast((5,), (7,), samples=NUM_SAMPLES, width=8, temperature=0.07, momentum=0.5)
    contrast.train()
    for _ in range(2):
        student, teacher = torch.randn(7, 5), torch.randn(7, 7)
        gate = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
        index = torch.randperm(NUM_SAMPLES)[:7]
        candidates = torch.cat([index[:, None], torch.randint(NUM_SAMPLES, (7, 12))], dim=1)
        mine = slice(rank(), None, world_size())
        contrast(student[mine], teacher[mine], gate[mine], candidates[mine])
    banks = contrast.student_bank, contrast.teacher_bank
    return [bank.rows for bank in banks] + [bank.normalizer for bank in banks]


class TestResuming:
    @pytest.mark.parametrize(("distiller", "saves"), [("at", 2), ("crd", 3), ("fsp", 5)])
    def test_ends_as_if_never_interrupted(self, on_both, tmp_path, distiller, saves):
        on_both(train, tmp_path / "whole", distiller, "adaptive", False, 2)
        on_both(train_until_the_power_fails, tmp_path / "cut", distiller, saves)
        on_both(train, tmp_path / "cut", distiller, "adaptive", True, 2)
        cut, whole = RunDir(tmp_path / "cut"), RunDir(tmp_path / "whole")
        assert_equal(read_checkpoint(cut.last), read_checkpoint(whole.last))
        assert records(cut) == records(whole)
        assert gate_records(cut) == gate_records(whole)

    def test_a_signal_to_one_process_stops_all_at_the_same_step(self, on_both, tmp_path):
        messages = on_both(train_until_a_signal, tmp_path / "stopped")
        assert messages[0] == messages[1]
        assert "stopped in train 2/3 after step 4/5, all saved" in messages[0]  # asked for in the third
        assert read_checkpoint(RunDir(tmp_path / "stopped").last)["progress"] == {"phase": 0, "epoch": 1, "step": 4}
        on_both(train, tmp_path / "stopped", "at", "adaptive", True)
        on_both(train, tmp_path / "whole", "at", "adaptive")
        stopped, whole = RunDir(tmp_path / "stopped"), RunDir(tmp_path / "whole")
        assert_equal(read_checkpoint(stopped.last), read_checkpoint(whole.last))

    @pytest.mark.parametrize("more", [False, True])
    def test_may_change_the_number_of_processes(self, on_both, tmp_path, more):
        """The epoch under way still counts every sample once, and a line says what is different."""
        alone = lambda function, *arguments: function(*arguments)  # noqa: E731
        before, after = (alone, on_both) if more else (on_both, alone)
        before(train_until_the_power_fails, tmp_path / "run", "at", 2)
        progress = read_checkpoint(RunDir(tmp_path / "run").last)["progress"]
        assert progress == {"phase": 0, "epoch": 0, "step": 4}
        after(train, tmp_path / "run", "at", "adaptive", True, 2)
        run = RunDir(tmp_path / "run")
        assert [record["epoch"] for record in records(run)] == [1, 2, 3]
        first, gates = records(run)[0]["train"], gate_records(run)[0]
        shares = np.array(gates["classes"]).mean(axis=0)
        assert [first[f"gate/{name}"] for name in gates["gates"]] == pytest.approx(shares, abs=1e-3)
        assert (first["top1"] * NUM_SAMPLES / 100) == pytest.approx(round(first["top1"] * NUM_SAMPLES / 100), abs=1e-4)
        now, then = (2, 1) if more else (1, 2)
        assert f"resumed on {now} instead of {then} processes" in run.log.read_text()


def train_until_the_power_fails(folder, distiller, saves):
    engine = make_engine(folder, distiller, "adaptive", False, 2)
    cut_power_after(engine, saves)
    with pytest.raises(PowerCut):
        finish(engine)


def train_until_a_signal(folder):
    engine = make_engine(folder, "at", "adaptive")
    step = engine._step

    def step_and_signal(phase, batch):
        step(phase, batch)
        if rank() == 1 and (engine.progress.epoch, engine.progress.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    engine._step = step_and_signal
    with pytest.raises(Interrupted) as caught:
        finish(engine)
    return str(caught.value)


class TestDevices:
    def test_every_process_takes_the_gpu_of_its_number(self, monkeypatch):
        pretend_gpus(monkeypatch, gpus=2, local_rank=1)
        for name in ("auto", "cuda"):
            assert choose_device(name) == torch.device("cuda:1")
        assert choose_device("cpu") == CPU

    def test_one_gpu_for_several_processes_is_refused(self, monkeypatch):
        pretend_gpus(monkeypatch, gpus=2, local_rank=1)
        with pytest.raises(UserError, match=r"training.device: cuda:0 is one GPU for 4 processes"):
            choose_device("cuda:0")
        pretend_gpus(monkeypatch, gpus=2, local_rank=2)
        with pytest.raises(UserError, match=r"nproc: process 3 of this machine has no GPU, PyTorch sees 2; nproc=2"):
            choose_device("auto")


def pretend_gpus(monkeypatch, gpus, local_rank):
    for name, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


class TestSynchronizedBatchNorm:
    def test_needs_gpus(self):
        with pytest.raises(UserError, match=r"training.sync_bn: needs GPUs, .* this is the cpu"):
            synchronize_batchnorm(toy_task(), toy_config(sync_bn=True), CPU)

    def test_is_left_out_unless_asked_for_and_on_a_single_process(self):
        for wanted, device in ((False, CPU), (True, torch.device("cuda"))):
            task = synchronize_batchnorm(toy_task(), toy_config(sync_bn=wanted), device)
            assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in task.modules())

    def test_keeps_every_tensor_and_the_frozen_twin(self, on_both):
        assert on_both(converted_task) == [(True, True, True)] * 2


def converted_task():
    """Are the layers converted, is every tensor still the same one, and does the twin share the student's?"""
    task = toy_task("fitnet")
    before = {name: id(tensor) for name, tensor in task.state_dict(keep_vars=True).items()}
    task = synchronize_batchnorm(task, toy_config(sync_bn=True), torch.device("cuda"))
    after = {name: id(tensor) for name, tensor in task.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        task.student.bn1.weight.fill_(3.0)
        task.student.bn1.running_mean.fill_(5.0)
    twin = task._twin[0].bn1
    shared = bool((twin.weight == 3).all() and (twin.running_mean == 5).all())
    return all(isinstance(x, nn.SyncBatchNorm) for x in (task.student.bn1, task.student.bn3)), before == after, shared


def launch(*command, count=2, **options):
    """Start a job the way the shell launchers do."""
    command = [sys.executable, "-m", "utils.launch", str(count), *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def job(tmp_path, body):
    """A script whose processes meet, and then run `body`."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """\
            import os, signal, sys, time
            sys.path.insert(0, os.getcwd())
            import torch
            from utils.command import guarded
            from utils.processes.group import barrier, process_group, rank
            from utils.errors import UserError

            def main():
                print("hello")
                with process_group(torch.device("cpu")):
                    barrier()
                    body()

            def body():
            """
        )
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\nif __name__ == "__main__":\n    guarded(main, trains=True)\n'
    )
    return script


class TestFailing:
    def end(self, process):
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    def test_an_error_on_one_process_ends_all_with_one_line(self, tmp_path):
        script = job(tmp_path, 'if rank() == 1:\n    raise UserError("part 1 is damaged")\nbarrier()')
        assert self.end(launch(script)) == (2, "hello\n", "error: part 1 is damaged\n")

    def test_the_same_error_everywhere_is_printed_once(self, tmp_path):
        (tmp_path / "no.yml").write_text("training: {epochs: ten}\n")
        code, _, err = self.end(launch("train.py", "--config", tmp_path / "no.yml"))
        assert code == 2
        assert err.startswith(f"error: {tmp_path}/no.yml: ")
        assert err.count("\n") == 1

    def test_a_wrong_command_line_is_an_error_like_any_other(self):
        with pytest.raises(UserError, match="unrecognized arguments: --tacher; --help tells more"):
            main_distill(arguments=["--tacher", "vgg13"])

    def test_sigterm_before_training_is_silent_but_for_one_line(self, tmp_path):
        script = tmp_path / "job.py"
        body = """\
        import os, pathlib, time
        other = pathlib.Path(__file__).with_name("other")
        if os.environ["RANK"] == "0":
            while not other.exists():  # a launcher that is still starting processes is another matter
                time.sleep(0.05)
            print("started", flush=True)
        else:
            other.touch()
        time.sleep(60)
        """
        script.write_text(textwrap.dedent(body))
        process = launch(script)
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        code, _, err = self.end(process)
        assert (code, err) == (EXIT_INTERRUPTED, NOTHING_TO_SAVE + "\n")

    def test_a_crash_shows_its_own_traceback_alone(self, tmp_path):
        script = job(tmp_path, "if rank() == 1:\n    1 / 0\nbarrier()")
        code, _, err = self.end(launch(script))
        assert code == 1
        assert err.count("Traceback") == 1
        assert err.endswith("ZeroDivisionError: division by zero\n\n")

    def test_a_killed_process_is_named(self, tmp_path):
        script = job(tmp_path, "if rank() == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nbarrier()")
        assert self.end(launch(script)) == (
            128 + signal.SIGKILL,
            "hello\n",
            "error: process 2 of 2 was ended by SIGKILL; is there enough memory?\n",
        )

    def test_sigterm_to_the_launcher_lets_all_finish_their_step_and_stop(self, tmp_path):
        body = """\
        from utils.processes.group import Agreement
        from utils.processes.stopping import Interrupted, StopRequest
        agreed = Agreement()
        with StopRequest() as stop:
            barrier()  # a process that has not come so far would die of the signal
            while not agreed(stop.requested):
                print("stepped", flush=True)
                time.sleep(0.1)
        raise Interrupted("all saved")
        """
        process = launch(job(tmp_path, body))
        while process.stdout.readline() != "stepped\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert self.end(process)[0::2] == (EXIT_INTERRUPTED, "all saved\n")

    @pytest.mark.parametrize("count", ["two", "", "0", "-1", "1.0", "٣", "9" * 5000])
    def test_a_number_of_processes_that_is_none_is_refused(self, capsys, count):
        assert launcher_main([count, "train.py"]) == 2
        line = f"error: nproc: {count[:40]!r}, expected the number of processes, 1 or more\n"
        assert capsys.readouterr().err == line


class TestLaunchers:
    def test_nproc_shares_a_run_among_processes(self, tmp_path):
        write_images(tmp_path / "data")
        # DistributedDataParallel, which is not used, would warn about the strides of channels_last.
        settings = {"batch_size": 8, "epochs": 1, "num_workers": 0, "channels_last": "true"}
        overrides = [f"training.{key}={value}" for key, value in settings.items()]
        overrides += [f"dataset.root={tmp_path / 'data'}", "dataset.img_h=16", "validation.num_workers=0"]
        done = subprocess.run(
            ["sh", "train_single.sh", *overrides, f"run.root={tmp_path / 'run'}"],
            env=os.environ
            | {"nproc": "2", "dataset": "imagefolder", "model": "resnet8"}
            | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "| 2 processes, each on " in done.stdout
        assert done.stdout.count("best val") == 1
        assert json.loads(next((tmp_path / "run").rglob("result.json")).read_text())["last_top1"] >= 0


def write_images(root):
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for k in range(2):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 100, (16, 16, 3)) + 100 * k
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.png")
