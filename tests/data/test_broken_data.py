"""Data that is not as it should be: unreadable files, wrong labels, too few images; workers that do not start."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from multiprocessing.context import ForkProcess

import numpy as np
import pytest
import torch
from jobs import is_alive
from pictures import image_folder, open_data, save, smooth_picture, whole
from PIL import Image
from ready_process import wait_for
from refusals import refusal

from datasets import DATASETS, Arrays, Source, check, check_batches
from datasets.check import check_labels
from datasets.download import without_downloads
from datasets.loading import decode as decoding
from datasets.loading import workers as workers_module
from datasets.loading.workers import Workers
from utils.config.schema import DatasetConfig
from utils.errors import Unforeseen, UserError

LOADERS = ["memory", "stream"]


def of_folder(root, **keys):
    return open_data("imagefolder", root, **{"img_h": 32} | keys)


def batches(loader):
    return [(batch.image, batch.label, batch.index) for batch in loader.epoch(0)]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y))


@pytest.fixture
def broken(tmp_path):
    """A folder with three unreadable images of 18, and one without the three."""
    damaged, clean = image_folder(tmp_path / "damaged"), image_folder(tmp_path / "clean")
    for name, end in {"train/ant/001.png": 100, "train/bee/000.png": 0, "val/ant/000.png": 20}.items():
        (damaged / name).write_bytes((damaged / name).read_bytes()[:end])
        (clean / name).unlink()
    return damaged, clean


class TestUnreadableImages:
    @pytest.mark.parametrize(("loader", "workers"), [("memory", 2), ("stream", 0)])
    def test_are_refused_by_name_unless_told_otherwise(self, broken, loader, workers):
        (broken[0] / "train/bee/000.png").unlink()
        message = r"damaged/train/ant/001\.png: cannot be read as an image [^\n]*; dataset\.on_corrupt=skip leaves such"
        with pytest.raises(UserError, match=message):
            batches(of_folder(broken[0], loader=loader, workers=workers).train)

    @pytest.mark.parametrize("loader", LOADERS)
    def test_are_skipped_as_if_they_had_never_been_there(self, broken, loader, caplog):
        damaged = of_folder(broken[0], on_corrupt="skip", loader=loader)
        clean = of_folder(broken[1], loader=loader)
        assert (damaged.train.num_samples, damaged.val.num_samples) == (10, 5)
        assert same(batches(damaged.train), batches(clean.train))
        assert same(batches(damaged.val), batches(clean.val))
        assert "2 of 12 training images skipped, the first: " in caplog.text
        assert "train/ant/001.png: cannot be read as an image" in caplog.text
        assert "1 of 6 validation images skipped" in caplog.text

    def test_are_remembered_until_the_images_change(self, broken, monkeypatch):
        memory = broken[0] / check.REMEMBERED
        memory.write_text("[]")
        first = of_folder(broken[0], on_corrupt="skip")
        found = json.loads(memory.read_text())["found"]
        assert {what: list(lines) for what, lines in found.items()} == {"training": ["1", "6"], "validation": ["0"]}
        assert "train/bee/000.png: cannot be read as an image" in found["training"]["6"]
        with monkeypatch.context() as patch:
            patch.setattr(check, "find_unreadable", lambda *_: pytest.fail("images are searched again"))
            config = DatasetConfig(name="imagefolder", root=str(broken[0]), on_corrupt="skip")
            assert check.readable_part(first.source, config, 0) is first.source  # as its teacher finds it
            assert same(batches(of_folder(broken[0], on_corrupt="skip").train), batches(first.train))
        save(smooth_picture(40, 40), broken[0] / "train/bee/000.png")
        assert of_folder(broken[0], on_corrupt="skip").train.num_samples == 11

    def test_are_searched_for_again_where_nothing_can_be_written(self, broken, caplog):
        (broken[0] / check.REMEMBERED).mkdir()
        assert of_folder(broken[0], on_corrupt="skip").train.num_samples == 10
        assert "searched for again next time" in caplog.text
        assert "names all images" not in caplog.text
        with without_downloads():
            of_folder(broken[1], on_corrupt="skip")
        assert not (broken[1] / check.REMEMBERED).exists()

    def test_are_shared_out_among_processes_that_all_get_the_same_answer(self, broken, monkeypatch):
        monkeypatch.setattr(decoding, "CHUNK", 2)
        source = DATASETS.get("imagefolder")(broken[0]).train
        expected, parts = decoding.find_unreadable(source), []
        monkeypatch.setattr(decoding, "world_size", lambda: 2)
        monkeypatch.setattr(decoding, "gather_objects", lambda own: parts.append(own) or parts)
        for number in range(2):
            monkeypatch.setattr(decoding, "rank", lambda number=number: number)
            found = decoding.find_unreadable(source)
        assert list(found.items()) == list(expected.items())
        assert [len(part) for part in parts] == [1, 1]

    @pytest.mark.parametrize(
        ("folder", "message"), [("train/bee", "no training image of class bee"), ("val", "no validation image of")]
    )
    def test_may_not_be_a_whole_class_or_all_of_validation(self, broken, folder, message):
        for path in (broken[0] / folder).rglob("*.png"):
            path.write_bytes(b"no picture")
        assert refusal(of_folder, broken[0], on_corrupt="skip").startswith(message)


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ([100, 4000, 700], "4000 is the largest value of 3 of them, and 0 to 65535 become black to white; "),
        ([-1000, 2000], "2000 is the largest value of 2 of them"),
        ([100, 40000], None),
    ],
)
def test_images_of_16_bits_that_look_dark_are_one_warning_that_a_range_ends(tmp_path, caplog, values, warning):
    for k, value in enumerate(values):
        picture = Image.fromarray(np.full((8, 8), value, dtype=np.int32 if value < 0 else np.uint16))
        for name in ("train/a", "val/a"):
            save(picture, tmp_path / name / f"{k}.tif")
    save(smooth_picture(8, 8), tmp_path / "train" / "b" / "0.png")
    of_folder(tmp_path, img_h=8)
    assert len(caplog.messages) == bool(warning)
    low, high = min(0, *values), max(values)
    assert not warning or (warning in caplog.text and f"dataset.image_range=[{low},{high}]" in caplog.text)
    caplog.clear()
    data = of_folder(tmp_path, img_h=8, image_range=(low, high), mean=[0.0] * 3, std=[1 / 255] * 3)
    shades = [min((value - low) * 256 // (high - low), 255) for value in values]
    assert [round(image.mean().item()) for image in whole(data.val)[0]] == shades
    assert not caplog.messages


def test_folders_that_are_reached_by_several_links_add_each_image_once(tmp_path):
    root = image_folder(tmp_path / "images", train=2, val=1)
    elsewhere = save(smooth_picture(8, 8), tmp_path / "elsewhere" / "deep" / "x.png").parents[1]
    (elsewhere / "deep" / "back").symlink_to("..")
    for number, target in enumerate([".", "../..", "../../train", elsewhere, elsewhere]):
        (root / "train" / "ant" / f"link{number}").symlink_to(target)
    other = save(smooth_picture(8, 8), tmp_path / "cows" / "x.png").parent
    (root / "train" / "cow").symlink_to(other)
    assert of_folder(root).train.labels.tolist() == [0, 0, 0, 1, 1, 2]
    (root / "train" / "dog").symlink_to("bee")
    assert "no images of its own in class folder dog" in refusal(of_folder, root)


def test_a_folder_that_cannot_be_listed_ends_the_search(tmp_path, monkeypatch):
    root = image_folder(tmp_path, train=1, val=1)
    (root / "train" / "ant" / "closed").mkdir()
    list_folder = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    closed = root / "train" / "ant" / "closed"
    assert refusal(of_folder, root) == f"opening the data set imagefolder failed: {closed}: Permission denied"


@pytest.mark.parametrize(
    ("train", "size", "world", "each"), [(1, 8, 2, "2 images give each of 2"), (6, 1, 1, "12 images give a")]
)
def test_training_batches_of_one_image_are_refused(tmp_path, train, size, world, each):
    source = DATASETS.get("imagefolder")(image_folder(tmp_path, train, val=1))
    line = refusal(check_batches, source, size, size, world)
    assert line.startswith(f"training.batch_size: batches of {size} from {each} ")
    check_batches(source, 2, 1, 1)


class TestArrays:
    IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def source(self, images, labels, names=("a", "b")):
        good = Arrays(self.IMAGES, torch.tensor([0, 1]))
        return Source(Arrays(images, torch.tensor(labels)), good, names, (0.5,) * 3, (0.5,) * 3, "none", (8, 8))

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (IMAGES, [0, 2], "training image 1 has the label 2, out of range: 2 classes are numbered from 0"),
            (IMAGES, [-1, 5], "training image 0 (and 1 more) has the label -1, out of range"),
            (IMAGES[:0], [], "the data set holds no training images"),
            (IMAGES, [1, 1], "all training images are of one class, b; there is nothing to tell it from"),
            (IMAGES.float(), [0, 1], "images float32 [2, 3, 8, 8] and labels int64 [2], expected uint8"),
            (IMAGES.permute(0, 2, 3, 1), [0, 1], "images uint8 [2, 8, 8, 3]"),
            (IMAGES, [0.0, 1.0], "labels float32 [2], expected"),
            (IMAGES, [0, 1, 1], "images uint8 [2, 3, 8, 8] and labels int64 [3]"),
        ],
    )
    def test_of_another_kind_or_with_labels_of_no_class_are_refused(self, images, labels, message, monkeypatch):
        monkeypatch.setitem(DATASETS._entries, "own", lambda root: self.source(images, labels))
        assert message in refusal(open_data, "own")

    def test_that_train_only_some_classes_are_a_warning(self, caplog):
        check_labels(self.source(self.IMAGES, [0, 2], ("a", "b", "c", "d")))
        assert caplog.messages == ["no image to train on of b, d, though there are 4 classes"]


class TestWorkers:
    @pytest.fixture
    def root(self, tmp_path):
        return image_folder(tmp_path)

    def open(self, root, loader, workers):
        return batches(of_folder(root, loader=loader, workers=workers).train)

    @pytest.mark.parametrize(("loader", "possible"), [("stream", 3), ("memory", 1)])
    def test_are_fewer_where_not_all_can_start(self, root, loader, possible, monkeypatch, caplog):
        expected = self.open(root, loader, workers=0)
        start, started = ForkProcess.start, []

        def start_some(process):
            if len(started) == possible:
                raise OSError(24, "Too many open files")
            start(process)
            started.append(process)

        monkeypatch.setattr(workers_module, "_cores", lambda: 8)
        monkeypatch.setattr(decoding, "CHUNK", 1)
        monkeypatch.setattr(ForkProcess, "start", start_some)
        assert same(self.open(root, loader, workers=8), expected)
        left = {1: "the training process", 3: "1 of 8"}[possible]
        assert f"no more processes can be started (Too many open files): images are decoded by {left}" in caplog.text
        assert [process.is_alive() for process in started[1:]] == [False] * len(started[1:])

    def test_do_not_outnumber_the_cores(self, monkeypatch):
        monkeypatch.setattr(workers_module, "_cores", lambda: 3)
        assert [Workers(str, count).count for count in (0, 2, 64)] == [0, 2, 3]

    @pytest.mark.parametrize("loader", LOADERS)
    def test_need_no_space_in_dev_shm(self, root, loader, monkeypatch):
        expected = self.open(root, loader, workers=0)

        def refuse(*_, **__):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(multiprocessing, "Lock", refuse)
        monkeypatch.setattr(multiprocessing.synchronize, "SemLock", refuse)
        monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
        assert same(self.open(root, loader, workers=2), expected)

    def test_that_die_are_one_line(self, root, monkeypatch):
        monkeypatch.setattr(decoding.Decoder, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(UserError, match=r"^a process that decodes images died \(killed by SIGKILL\); [^\n]+$"):
            self.open(root, "stream", workers=2)
        assert not multiprocessing.active_children()

    def test_name_the_image_at_which_code_of_ones_own_fails(self):
        class Odd(Arrays):
            def picture(self, index):
                return {}[index]

        split = Odd(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        line = r"^decoding image 0 failed: KeyError: 0 \(.*test_broken_data\.py, line \d+"
        with pytest.raises(Unforeseen, match=line):
            decoding.decode_all(split, (8, 8), workers=2)

    def test_end_with_the_process_that_started_them(self, root):
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=start_and_die, args=(root, writer))
        process.start()
        pids = reader.recv()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        wait_for(lambda: not any(map(is_alive, pids)))

    def test_survive_the_signals_that_stop_a_run(self, root):
        epoch = of_folder(root, loader="stream", workers=1, batch_size=2).train.epoch(0)
        first = next(epoch)
        for process in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(process.pid, number)
        assert len([first, *epoch]) == 6


def start_and_die(root, writer):
    loaders = [of_folder(root, loader="stream", workers=2, batch_size=2) for _ in range(2)]
    epochs = [data.train.epoch(0) for data in loaders]
    for epoch in epochs:
        next(epoch)
    writer.send([process.pid for process in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)
