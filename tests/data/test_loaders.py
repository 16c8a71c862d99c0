"""Order, resumption, shards: what both loaders promise."""

import atexit
import itertools
import multiprocessing.util
import os

import pytest
import torch
from pictures import image_folder, open_data, whole
from torchvision import transforms
from torchvision.datasets import ImageFolder

import datasets.build
from datasets.loading.augment import Augment, Recipe
from datasets.loading.loader import MemoryLoader
from datasets.loading.order import Order, derive_seed
from datasets.loading.stream import StreamLoader
from datasets.source import Arrays
from utils.errors import UserError

CPU = torch.device("cpu")
COUNT, BATCH = 38, 8
KINDS = ["memory", "stream"]
NORM = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def noisy(count=COUNT):
    """Random images of 16x16."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Arrays(images, torch.randint(10, (count,), generator=generator))


def loader(kind, count=COUNT, batch_size=BATCH, *, augment=None, shuffle=True, seed=3, shard=(0, 1), workers=0):
    """Noisy images; the streaming loader cuts parts of 8x8 out of them unless told otherwise."""
    split, order = noisy(count), Order(count, batch_size, shuffle=shuffle, shard=shard)
    augment = augment or {"memory": "crop_flip", "stream": "resized_crop"}[kind]
    transform = Augment(augment, (8, 8) if augment == "resized_crop" else (16, 16), *NORM, CPU)
    if kind == "memory":
        return MemoryLoader(split.images, split.labels, order, transform, seed=seed, device=CPU)
    return StreamLoader(split, order, transform, margin=False, workers=workers, seed=seed, device=CPU)


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) and all(torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y))


def indices(batches):
    return torch.cat([batch.index for batch in batches])


@pytest.mark.parametrize("kind", KINDS)
class TestBothLoaders:
    def test_yield_typed_batches_with_the_labels_of_their_images(self, kind):
        data = loader(kind)
        batch = next(data.epoch(0))
        assert batch.image.dtype == torch.float32
        assert batch.image.shape[:2] == (BATCH, 3)
        assert batch.image.is_contiguous()
        assert batch.label.dtype == batch.index.dtype == torch.int64
        assert torch.equal(batch.label, data.labels[batch.index])
        assert data.num_samples == len(data.labels) == COUNT

    def test_show_every_image_once_per_epoch_in_an_order_of_its_own(self, kind):
        first, second = (indices(loader(kind).epoch(epoch)) for epoch in (0, 1))
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(COUNT))
        assert not torch.equal(first, second)
        assert not torch.equal(first, torch.arange(COUNT))

    def test_yield_the_same_batches_bit_for_bit_from_the_same_seed(self, kind):
        assert same(loader(kind).epoch(4), loader(kind).epoch(4))
        assert not same(loader(kind).epoch(4), loader(kind, seed=4).epoch(4))

    def test_start_at_any_step_as_if_never_interrupted(self, kind):
        full = list(loader(kind).epoch(2))
        resumed = loader(kind)
        assert len(full) == len(resumed) == 5
        for start in range(len(full) + 1):
            assert same(resumed.epoch(2, start), full[start:])

    def test_augment_an_image_anew_every_epoch(self, kind):
        data = loader(kind)
        first, second = whole(data, epoch=0)[0], whole(data, epoch=1)[0]
        assert sum(torch.equal(*pair) for pair in zip(first, second)) < COUNT / 4

    @pytest.mark.parametrize("world", [2, 3])
    def test_shards_are_the_slices_of_the_unsharded_batches(self, kind, world):
        undivided = list(loader(kind).epoch(1))
        shards = [list(loader(kind, shard=(rank, world)).epoch(1)) for rank in range(world)]
        assert {len(shard) for shard in shards} == {len(undivided)}
        for step, rank in itertools.product(range(len(undivided)), range(world)):
            assert same([shards[rank][step]], [[part[rank::world] for part in undivided[step]]])

    def test_evaluate_in_order(self, kind):
        data = loader(kind, shuffle=False, augment="none")
        assert torch.equal(indices(data.epoch(0)), torch.arange(COUNT))

    def test_leave_the_global_random_state_alone(self, kind):
        before = torch.get_rng_state()
        list(loader(kind).epoch(0))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("count", "shuffle", "sizes"),
    [
        (18, True, [[8, 8, 2]]),
        (17, True, [[8, 9]]),
        (1, True, [[1]]),
        (19, True, [[4, 6], [4, 5]]),
        (17, False, [[8, 8, 1]]),
        (17, False, [[4, 5], [4, 4]]),
    ],
)
def test_no_process_trains_on_one_image_or_evaluates_none(count, shuffle, sizes):
    for rank, own in enumerate(sizes):
        order = Order(count, BATCH, shuffle=shuffle, shard=(rank, len(sizes)))
        assert [len(range(count)[order.part(step)]) for step in range(len(order))] == own
        assert order.largest_part() == max(own)


class TestBalancedOrder:
    LABELS = torch.tensor([0] * 30 + [1] * 6 + [2] * 2)

    def draw(self, epoch=0, shard=(0, 1)):
        order = Order(COUNT, BATCH, shuffle=True, balanced=self.LABELS, shard=shard)
        return order.draw(torch.Generator().manual_seed(epoch))

    def test_shows_all_classes_equally_often_and_an_image_again_only_after_all_of_its_class(self):
        counts = self.draw().bincount(minlength=COUNT)
        assert sorted(self.LABELS.bincount(counts).int().tolist()) == [12, 13, 13]
        for label in range(3):
            own = counts[label == self.LABELS]
            assert own.max() - own.min() <= 1

    def test_is_another_in_every_epoch_and_the_same_from_the_same_seed(self):
        assert torch.equal(self.draw(1), self.draw(1, shard=(1, 2)))
        assert not torch.equal(self.draw(1), self.draw(2))
        assert (self.LABELS[self.draw()][:12].bincount(minlength=3) > 0).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_that_of_the_training_images_alone_and_resumes_in_the_middle_of_an_epoch(self, tmp_path, kind):
        root = image_folder(tmp_path, train=10)
        for k in range(2, 10):
            (root / "train" / "bee" / f"{k:03d}.png").unlink()
        keys = {"sampler": "balanced", "img_h": 32, "loader": kind, "batch_size": 4}
        data = open_data("imagefolder", root, **keys)
        full = list(data.train.epoch(1))
        assert torch.cat([batch.label for batch in full]).bincount().tolist() == [6, 6]
        assert same(data.train.epoch(1, 2), full[2:])
        assert torch.equal(data.val.labels, torch.tensor([0] * 3 + [1] * 3))


def test_neighbouring_seeds_and_epochs_have_nothing_in_common():
    seeds = {derive_seed(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900


def test_the_memory_loader_never_reads_a_value_back_from_its_device():
    # A meta tensor has a shape and no values: whatever waits for one fails here as it would stall CUDA.
    meta = torch.device("meta")
    images, labels = torch.zeros(COUNT, 3, 16, 16, dtype=torch.uint8), torch.zeros(COUNT, dtype=torch.int64)
    augment = Augment("crop_flip", (16, 16), *NORM, meta)
    data = MemoryLoader(images, labels, Order(COUNT, BATCH, shuffle=True), augment, seed=0, device=meta)
    assert [batch.image.shape[0] for batch in data.epoch(0)] == [8, 8, 8, 8, 6]


class TestStreaming:
    def test_does_not_depend_on_the_number_of_workers(self):
        alone, helped = loader("stream"), loader("stream", workers=2)
        for epoch in range(2):  # the workers live on into the second epoch
            assert same(alone.epoch(epoch), helped.epoch(epoch))
        assert same(alone.epoch(2, start=3), helped.epoch(2, start=3))

    def test_cuts_the_random_parts_that_torchvision_cuts(self):
        ours, _ = whole(loader("stream"), epoch=1)
        with torch.random.fork_rng():
            for index, image in enumerate(ours):
                torch.manual_seed(derive_seed(derive_seed(3, 1), index))
                crop = transforms.RandomResizedCrop(8)(noisy().picture(index))
                expected = transforms.functional.normalize(transforms.functional.to_tensor(crop), *NORM)
                assert any(torch.allclose(image, way, atol=1e-6) for way in (expected, expected.flip(2)))

    def test_trivialaugment_changes_every_image_anew_in_any_process(self):
        state = torch.get_rng_state()
        alone, helped = (loader("stream", augment="trivialaugment", workers=workers) for workers in (0, 2))
        plain = loader("stream", augment="crop_flip")
        epochs = [list(alone.epoch(epoch)) for epoch in range(2)]
        assert same(epochs[1], helped.epoch(1))
        changed = [(a.image != b.image).flatten(1).any(1) for a, b in zip(epochs[1], plain.epoch(1))]
        assert torch.cat(changed).float().mean() > 0.5  # one of its operations changes nothing
        assert torch.equal(torch.get_rng_state(), state)

    def test_an_epoch_ends_when_another_begins(self):
        helped = loader("stream", workers=2)
        left = helped.epoch(0)
        next(left)
        assert same(helped.epoch(1), loader("stream").epoch(1))
        assert list(left) == []

    def test_a_process_ends_although_an_epoch_was_left_and_nobody_closed_the_loader(self):
        """A test that fails, say, whose traceback keeps the epoch."""
        context = multiprocessing.get_context("fork")
        process = context.Process(target=leave_an_epoch)
        process.start()
        process.join(60)
        assert process.exitcode == 0


def leave_an_epoch():
    atexit._clear()  # what this process has copied from the one of the tests
    atexit.register(multiprocessing.util._exit_function)
    epoch, cycle = loader("stream", workers=2).epoch(0), [loader("stream", workers=1)]
    next(epoch)
    next(cycle[0].epoch(0))
    cycle.append(cycle)  # ends in a garbage collection, or not before the program does
    del cycle
    atexit._run_exitfuncs()  # as at the end of a program, with `epoch` still there
    os._exit(0)


class TestEvaluation:
    @pytest.mark.parametrize(
        ("size", "frame", "shorter"),
        [((60, 45), (32, 32), 32), ((30, 50), (32, 32), 32), ((200, 90), (32, 32), 32), ((41, 40), (20, 50), 50)],
    )
    def test_scales_the_shorter_side_and_cuts_the_centre(self, tmp_path, size, frame, shorter):
        root = image_folder(tmp_path, train=1, size=size)
        data = open_data("imagefolder", root, img_h=frame[0], img_w=frame[1])
        assert_shows(data.val, tmp_path / "val", transforms.Resize(shorter), transforms.CenterCrop(frame))

    def test_leaves_the_margin_of_imagenet_where_training_cuts_resized_crops(self, tmp_path):
        data = open_data("imagenet", image_folder(tmp_path, train=1, val=1, size=(300, 400)))
        assert data.source.image_size == (224, 224)
        assert_shows(data.val, tmp_path / "val", transforms.Resize(256), transforms.CenterCrop(224))

    @pytest.mark.parametrize("keys", [{"img_h": 24, "img_w": 32}, {"img_h": 72}], ids=str)
    def test_is_the_same_from_memory_and_from_files(self, tmp_path, keys):
        root = image_folder(tmp_path, size=(50, 70))
        held, streamed = (open_data("imagefolder", root, loader=kind, augment="flip", **keys) for kind in KINDS)
        assert same(held.val.epoch(0), streamed.val.epoch(0))
        assert same(held.train.epoch(0), streamed.train.epoch(0))


def assert_shows(data, folder, *cut):
    """The loader's images are what torchvision makes of the files."""
    norm = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pipeline = transforms.Compose([*cut, transforms.ToTensor(), norm])
    expected = [pipeline(picture) for picture, _ in ImageFolder(folder)]
    torch.testing.assert_close(whole(data)[0], torch.stack(expected), rtol=0, atol=5e-6)


class TestChoice:
    def kinds(self, root, **keys):
        data = open_data("imagefolder", root, **keys)
        return type(data.train), type(data.val)

    def test_large_sets_are_streamed(self, tmp_path, monkeypatch):
        root = image_folder(tmp_path, train=6, val=3)
        monkeypatch.setattr(datasets.build, "MEMORY_LIMIT", 12 * 3 * 40 * 40 - 1)  # one byte short, with padding
        assert self.kinds(root, img_h=32) == (StreamLoader, MemoryLoader)
        monkeypatch.setattr(datasets.build, "MEMORY_LIMIT", 12 * 3 * 40 * 40)
        assert self.kinds(root, img_h=32) == (MemoryLoader, MemoryLoader)

    def test_the_config_has_the_last_word(self, tmp_path, monkeypatch):
        root = image_folder(tmp_path)
        assert self.kinds(root, img_h=32, loader="stream") == (StreamLoader, StreamLoader)
        monkeypatch.setattr(datasets.build, "MEMORY_LIMIT", 0)
        assert self.kinds(root, img_h=32, loader="memory") == (MemoryLoader, MemoryLoader)

    def test_images_above_64_pixels_get_resized_crops_and_are_streamed(self, tmp_path):
        root = image_folder(tmp_path)
        assert self.kinds(root, img_h=64) == (MemoryLoader, MemoryLoader)
        assert self.kinds(root, img_h=72) == (StreamLoader, MemoryLoader)
        assert self.kinds(root, img_h=72, augment="flip") == (MemoryLoader, MemoryLoader)
        for side, cuts in ((32, False), (72, True)):
            data = open_data("imagefolder", root, img_h=side, augment="trivialaugment")
            assert (type(data.train), type(data.val)) == (StreamLoader, MemoryLoader)
            assert data.train.augment.recipe == Recipe(crop=not cuts, flip=True, resized_crop=cuts, trivial=True)

    def test_resized_crops_from_memory_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"^dataset\.loader: memory holds .* set dataset\.loader=stream"):
            self.kinds(image_folder(tmp_path), img_h=96, loader="memory")
        with pytest.raises(UserError, match=r"the augmentation trivialaugment needs the original ones in every epoch"):
            open_data("digits", augment="trivialaugment", loader="memory")
