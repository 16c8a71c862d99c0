"""Each source: the images that it finds on disk, and its message where there are none."""

import hashlib
import os
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision.datasets.cifar
import torchvision.datasets.utils
from pictures import image_folder, noise, open_data, save, smooth_picture, whole
from refusals import refusal

from datasets import DATASETS


@pytest.fixture
def offline(monkeypatch):
    """A machine without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def source(name, root=None):
    return DATASETS.get(name)(root)


def digest(arrays):
    """The first 16 digits of the SHA-256 of images and labels."""
    return hashlib.sha256(arrays.images.numpy().tobytes() + arrays.labels.numpy().tobytes()).hexdigest()[:16]


class TestDigits:
    def test_split_is_fixed_and_never_mirrored(self):
        digits = source("digits")
        assert [digest(digits.train), digest(digits.val)] == ["7a80beb970579370", "cc77b52d9ed64b6f"]
        assert digits.augment == "crop"

    def test_training_images_are_normalised(self):
        images, _ = whole(open_data("digits", augment="none").train)
        assert images.mean().abs() < 1e-3
        assert images.std() == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize(("keys", "size"), [({"img_w": 8}, (8, 8)), ({"img_h": 8, "img_w": 12}, (8, 12))])
    def test_other_sizes_are_had_by_scaling(self, keys, size):
        data = open_data("digits", **keys, loader="stream")
        assert (data.train.num_samples, data.val.num_samples, data.source.image_size) == (776, 1021, size)
        assert next(data.train.epoch(0)).image.shape == (8, 3, *size)

    def test_a_key_for_other_data_and_a_wrong_number_of_classes_are_refused(self):
        assert "dataset.val_split: digits has no use for it" in refusal(open_data, "digits", val_split=0.1)
        assert "digits has 10 classes; set dataset.num_classes=10" in refusal(open_data, "digits", num_classes=100)


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        write_pickle(folder / name, {"data": noise(4, 3072, seed=number), "labels": [number, 1, 2, 3]})
    write_pickle(folder / "batches.meta", {"label_names": [f"class {number}" for number in range(10)]})


def write_cifar100(root):
    folder = root / "cifar-100-python"
    for name, count in {"train": 6, "test": 3}.items():
        write_pickle(folder / name, {"data": noise(count, 3072, seed=count), "fine_labels": list(range(count))})
    write_pickle(folder / "meta", {"fine_label_names": [f"fine {number}" for number in range(100)]})


NORMS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class TestCIFAR:
    @pytest.mark.parametrize(
        ("write", "name", "labels", "class_name"),
        [(write_cifar10, "CIFAR10", [5, 1, 2, 3], "class 9"), (write_cifar100, "cifar_100", [0, 1, 2], "fine 9")],
    )
    def test_torchvisions_files_are_read(self, tmp_path, monkeypatch, write, name, labels, class_name):
        # Files of the right name stand for the published ones, whose checksums torchvision knows.
        monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))
        write(tmp_path)
        known = source(name, tmp_path)
        assert (known.augment, known.image_size, known.class_names[9]) == ("crop_flip", (32, 32), class_name)
        assert (known.mean, known.std) == NORMS[known.num_classes]
        data = open_data(name, tmp_path, mean=[0.0] * 3, std=[1 / 255] * 3)
        images, found = whole(data.val)
        assert found.tolist() == labels
        assert len(data.train.labels) == {10: 20, 100: 6}[known.num_classes]
        seed = {10: 5, 100: 3}[known.num_classes]
        assert torch.equal(images.round().byte().flatten(1), torch.from_numpy(noise(len(labels), 3072, seed=seed)))

    def test_damaged_files_are_refused(self, tmp_path):
        write_cifar10(tmp_path)
        assert "cifar-10-batches-py: files are missing or damaged; delete" in refusal(open_data, "cifar-10", tmp_path)

    @pytest.mark.parametrize(
        ("name", "archive"), [("cifar-10", "cifar-10-python.tar.gz"), ("tiny-imagenet", "tiny-imagenet-200.zip")]
    )
    def test_without_files_and_network_it_says_where_the_files_go(self, tmp_path, offline, capfd, name, archive):
        line = refusal(open_data, name, tmp_path / "data")
        assert f"put {archive} or the folder" in line
        assert f"in {tmp_path / 'data'}" in line
        assert "dataset=digits, which needs no files" in line
        assert not (tmp_path / "data").exists()
        assert capfd.readouterr() == ("", "")


def write_tiny_imagenet(home, *, val_in_classes=False):
    """The official layout with three classes: `wnids.txt` unsorted, grey and coloured files."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "wnids.txt").write_text("n03\nn01\nn02\n")
    for number, wnid in enumerate(["n01", "n02", "n03"]):
        for image in range(2):
            save(smooth_picture(64, 64, seed=number), home / "train" / wnid / "images" / f"{wnid}_{image}.JPEG")
        (home / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t9\t9\n")
    wnids = ["n02", "n03", "n02", "n01"]
    for number, wnid in enumerate(wnids):
        folder = home / "val" / (f"{wnid}/images" if val_in_classes else "images")
        save(smooth_picture(64, 64, seed=number).convert("L"), folder / f"val_{number}.JPEG")
    if not val_in_classes:
        lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t9\t9\n" for number, wnid in enumerate(wnids)]
        (home / "val" / "val_annotations.txt").write_text("".join(lines))
    return home


class TestTinyImageNet:
    @pytest.mark.parametrize(("val_in_classes", "labels"), [(False, [1, 2, 1, 0]), (True, [0, 1, 1, 2])])
    def test_labels_number_the_sorted_ids(self, tmp_path, val_in_classes, labels):
        data = open_data("tiny-imagenet", write_tiny_imagenet(tmp_path, val_in_classes=val_in_classes))
        assert (data.source.class_names, data.source.image_size) == (("n01", "n02", "n03"), (64, 64))
        assert (data.train.labels.tolist(), data.val.labels.tolist()) == ([0, 0, 1, 1, 2, 2], labels)
        assert next(data.train.epoch(0)).image.shape == (6, 3, 64, 64)
        tiny = source("tiny-imagenet", tmp_path)
        assert (tiny.augment, tiny.mean, tiny.std) == ("flip", *NORMS[10])

    @pytest.mark.parametrize("lines", ["val_0.JPEG\n", "val_0.JPEG\tn99\n", None])
    def test_annotations_that_do_not_fit_are_refused(self, tmp_path, lines):
        table = write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
        table.unlink() if lines is None else table.write_text(lines)
        line = refusal(open_data, "tiny-imagenet", tmp_path)
        assert ("no training images of class n99" if lines and "n99" in lines else f"reading {table}, ") in line

    def test_a_zip_in_the_root_is_unpacked(self, tmp_path, offline, monkeypatch):
        home = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
        archive = Path(shutil.make_archive(home, "zip", tmp_path, home.name))
        monkeypatch.setattr("datasets.tiny_imagenet.MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        shutil.rmtree(home)
        for _ in range(2):  # the second time from the unpacked folder
            assert source("tiny-imagenet", tmp_path).class_names == ("n01", "n02", "n03")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


class TestImageFolder:
    def test_images_get_32_pixels_where_nothing_else_is_said(self, tmp_path, caplog):
        root = image_folder(tmp_path, classes=("zebra", "ape", "bee"))
        shutil.rmtree(root / "val" / "bee")
        data = open_data("imagefolder", root)
        assert (data.source.class_names, data.source.image_size) == (("ape", "bee", "zebra"), (32, 32))
        assert data.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert data.val.labels.tolist() == [0] * 3 + [2] * 3
        assert "dataset.img_h and img_w are not set: images are scaled to 32x32" in caplog.text

    @pytest.mark.parametrize(
        ("moved", "to", "message"),
        [
            (".", "../elsewhere", " is no folder; images belong in "),
            ("val", "../val", "the split of no image is val; a column split says it, or dataset.val_split=0.1"),
            ("train", "../train", "holds no folders train and val; images belong in "),
            ("val/bee", "valid", "both val and valid could be the val split"),
            ("val/bee", "val/yak", "no training images of class yak"),
            ("train/ant/000.png", "train/elk/fox/x.txt", "no images of its own in class folder elk"),
            ("val", "val/ant", "val: holds no class folders"),
        ],
    )
    def test_what_is_missing_is_one_line(self, tmp_path, moved, to, message):
        root = image_folder(tmp_path / "images")
        if to.startswith(f"{moved}/"):  # its files stay, without the folders of the classes
            shutil.rmtree(root / moved)
            (root / moved).mkdir()
        else:
            (root / to).parent.mkdir(parents=True, exist_ok=True)
            (root / moved).rename(root / to)
        assert message in refusal(open_data, "imagefolder", root)

    def test_finds_nested_files_of_all_common_kinds_whatever_their_size(self, tmp_path):
        for number, name in enumerate(
            ["a.jpg", "b.JPEG", "c.png", "deep/er/d.bmp", "e.webp", "f.tif", "g.GIF", "h.ppm"]
        ):
            save(smooth_picture(20 + number, 50 - number), tmp_path / "train" / "x" / name)
            save(smooth_picture(40, 40), tmp_path / "test" / "x" / name)
        (tmp_path / "train" / "x" / "notes.txt").write_text("not a picture")
        (tmp_path / "train" / "x" / "._a.jpg").write_bytes(b"what macOS leaves in archives")
        (tmp_path / "train" / ".cache").mkdir()
        save(smooth_picture(40, 40), tmp_path / "train" / "y" / "0.png")
        data = open_data("imagefolder", tmp_path, img_h=32)
        assert (data.train.num_samples, data.val.num_samples, data.source.num_classes) == (9, 8, 2)
        assert next(data.val.epoch(0)).image.shape == (8, 3, 32, 32)

    def test_files_that_may_be_images_and_are_left_out_are_counted(self, tmp_path, caplog):
        root = image_folder(tmp_path)
        for name in ("ant/a.heic", "ant/b.svg", "ant/5f3a", "loose.png", "ant/notes.txt", ".hidden.png", "Thumbs.db"):
            (root / "train" / name).write_bytes(b"")
        source("imagefolder", root)
        assert f"in no class skipped: 4, the first: {root}/train/loose.png" in caplog.text

    @pytest.mark.parametrize(
        ("train", "val"),
        [("Train", "Test"), ("train_set", "test_set"), ("TRAINING", "Validation"), ("training", "dev")],
    )
    def test_splits_have_other_names_in_upper_and_lower_case(self, tmp_path, train, val):
        root = image_folder(tmp_path)
        (root / "val").rename(root / val)
        (root / "train").rename(root / train)
        assert len(source("imagefolder", root).val) == 6
        if "est" not in val:
            assert "divided into train and val already" in refusal(DATASETS.get("imagefolder"), root, val_split=0.2)

    def test_test_stays_apart_where_val_is_there(self, tmp_path, caplog):
        save(smooth_picture(8, 8), image_folder(tmp_path) / "test" / "images" / "0.png")
        assert source("imagefolder", tmp_path).test is None
        assert "test: not sorted into the classes of train" in caplog.text
        shutil.rmtree(tmp_path / "test")
        shutil.copytree(tmp_path / "val", tmp_path / "Test")
        parts = source("imagefolder", tmp_path)
        assert [len(part) for part in (parts.train, parts.val, parts.test)] == [12, 6, 6]
        assert "/Test/ant/" in parts.test.path(0)

    @pytest.mark.parametrize("val_split", [None, 0.2])
    def test_a_folder_of_no_known_name_beside_train_is_named(self, tmp_path, val_split):
        (image_folder(tmp_path) / "val").rename(tmp_path / "eval")
        line = refusal(DATASETS.get("imagefolder"), tmp_path, val_split=val_split)
        assert "train holds class folders, and eval beside it is of no known name; call the folder for" in line

    def test_undivided_it_needs_a_share(self, tmp_path):
        root = image_folder(tmp_path) / "train"
        assert f"in {root}/<class>/ with dataset.val_split=0.1" in refusal(open_data, "imagefolder", root)
        divided = DATASETS.get("imagefolder")(root, val_split=0.2)
        assert (divided.class_names, len(divided.train), divided.val.labels.tolist()) == (("ant", "bee"), 9, [0, 0, 1])
        paths = {part.path(k) for part in (divided.train, divided.val) for k in range(len(part))}
        assert len(paths) == 12
        shutil.rmtree(tmp_path / "val")
        assert len(DATASETS.get("imagefolder")(tmp_path, val_split=0.2).val) == 3
        (root / "ant").rename(tmp_path / "plane")
        (root / "bee").rename(tmp_path / "bee")
        (tmp_path / "plane" / "000.png").rename(root / "000.png")  # a class of trains
        (tmp_path / "plane" / "001.png").rename(root / "001.png")
        assert DATASETS.get("imagefolder")(tmp_path, val_split=0.3).class_names == ("bee", "plane", "train")

    def test_folders_of_systems_and_hidden_ones_are_passed_over(self, tmp_path):
        root = image_folder(tmp_path)
        for place in (".", "train", "val", "train/ant", "train/ant/deep"):
            for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".AppleDouble"):
                save(smooth_picture(8, 8), root / place / name / "x.png")
        save(smooth_picture(8, 8), root / "train/ant/deep/y.png")
        parts = source("imagefolder", root)
        assert parts.class_names == ("ant", "bee")
        assert (len(parts.train), len(parts.val)) == (13, 6)
        assert len(DATASETS.get("imagefolder")(root / "train", val_split=0.2).train) == 10

    def test_names_that_are_not_utf8_are_read(self, tmp_path, caplog):
        root = image_folder(tmp_path)
        os.rename(root / "train/bee/000.png", os.fsencode(root) + b"/train/bee/\xff.png")
        for folder in ("train", "val"):
            os.rename(root / folder / "ant", os.fsencode(root / folder) + b"/a\xe9")
            with open(os.fsencode(root / folder / "bee") + b"/\xff.heic", "wb"):
                pass
        data = open_data("imagefolder", root, img_h=32)
        assert data.source.class_names == ("a\\udce9", "bee")
        assert whole(data.train)[1].tolist() == [0] * 6 + [1] * 6
        caplog.text.encode("utf-8")
