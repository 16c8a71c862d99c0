"""From a checkpoint back to what wrote it: config, data, networks, policy."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from datasets import Source, open_data, readable_part
from datasets.download import without_downloads
from datasets.loading.loader import Loader
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from models import StagedModel
from utils.config import Config, load_config
from utils.config.layers import Layers
from utils.errors import UserError, doing, enumerate_some
from utils.run_folder.checkpoint import checkpoint_file, read_checkpoint
from utils.run_folder.resume import refuse_other_classes
from utils.run_folder.weights import EMA_HELP, average_instead, take_weights
from utils.training.build import assemble, build_network, load_split, load_teacher, prefix_of
from utils.training.device import choose_device, set_up
from utils.training.precision import autocast
from utils.training.trust import TRUST_HELP, refuse_foreign_network, refuse_foreign_options


@dataclass(frozen=True)
class Restored:
    """An opened checkpoint.

    Attributes:
        path: the file.
        config: of the run that wrote it, under the overrides given.
        content: everything in the file; its weights may have been replaced by their moving average.
        source: the data set; without images where `restore` says so.
        device: where networks and images go.
        agreed: words of the command line, see `refuse_foreign_network`.
    """

    path: Path
    config: Config
    content: dict[str, Any]
    source: Source
    device: torch.device
    agreed: Sequence[str] | None = None

    @cached_property
    def val(self) -> Loader:
        """The validation images."""
        return load_split(self.source, self.config, self.device, "val")

    @cached_property
    def test(self) -> Loader | None:
        """The test images, where the data has some."""
        return None if self.source.test is None else load_split(self.source, self.config, self.device, "test")

    @property
    def autocast(self) -> torch.autocast:
        """The context of a forward pass in the precision of the training."""
        return autocast(self.device, self.config.training.precision)

    def student(self) -> StagedModel:
        """The network that was trained, in evaluation mode.

        Raises:
            UserError: the weights are another network's, or were trained on other classes.
        """
        network, section = self.config.student, section_of(self.config)
        title = f"the {'student ' if self.config.kd else ''}{network.title} of its config"
        refuse_other_classes(self.content, self.source, f"{self.path}: {title}")
        model = build_network(network, self.source)
        take_weights(model, self.content, self.path, title, **prefix_of(network, section))
        return model.to(self.device).eval()

    def teacher(self) -> StagedModel:
        """The teacher, in evaluation mode.

        Raises:
            UserError: see `load_teacher`, or its code is not trusted.
        """
        refuse_foreign_network(self.config.kd.teacher, "kd.teacher", self.path, self.agreed)
        model = build_network(self.config.kd.teacher, self.source)
        load_teacher(model, self.config, self.source)
        return model.to(self.device).eval()

    def task(self) -> SpotAdaptiveDistillation:
        """Both networks, distiller and policy, in evaluation mode.

        Raises:
            UserError: the checkpoint is of a network trained alone, or the teacher's is not there.
        """
        if self.config.kd is None:
            raise UserError(f"{self.path}: of a network trained alone; it has no spots and no policy")
        refuse_foreign_options(self.config, self.path, self.agreed)
        task = assemble(self.config, self.student(), self.teacher(), self.source).to(self.device)
        with doing(f"{self.path}: loading the policy and the distiller"):
            task.load_extra_state(self.content["extra"])
            following = self.content["progress"]  # what comes after the checkpoint
            task.start_epoch(max(0, following["epoch"] - (following["step"] == 0)))
        return task.eval()


def add_arguments(parser: ArgumentParser, what: str = "a checkpoint") -> None:
    """Let `parser` read what `restore_from` needs."""
    parser.add_argument("checkpoint", help=f"{what}, or a run's folder (best.pth)")
    parser.add_argument("--config", metavar="FILE", help="what the checkpoint is of, where it does not say so itself")
    parser.add_argument("--ema", action="store_true", help=EMA_HELP)
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)


def restore_from(options: Namespace, overrides: Sequence[str], *, images: bool = True) -> Restored:
    """`restore` as the command line says."""
    how = {"trust": options.trust, "average": options.ema, "images": images}
    return restore(Path(options.checkpoint), overrides, options.config, **how)


def restore(
    path: Path,
    overrides: Sequence[str] = (),
    config: str | None = None,
    *,
    trust: bool = False,
    average: bool = False,
    images: bool = True,
) -> Restored:
    """Open a checkpoint, or the best one of a run folder.

    Args:
        path: the file or the folder.
        overrides: ``key=value`` words that win over the config in the checkpoint, e.g. ``dataset.root=data``.
        config: a file that says what the checkpoint is of, for those that do not say so themselves.
        trust: build any network that the checkpoint's own config names, and download its data set.
        average: of the student, take the moving average of its weights.
        images: open the data set; else only where the checkpoint does not say how images are prepared.

    Raises:
        UserError: it cannot be read, does not say what it is of, or names what is not to be trusted.
    """
    path = checkpoint_file(path)
    if path.is_dir() and (below := [str(file.parents[1]) for file in sorted(path.glob("**/ckpt/best.pth"))]):
        raise UserError(f"{path}: is no run; the runs in it are {enumerate_some(below, 20)}")
    content = read_checkpoint(path)
    if average:
        content = average_instead(content, path)
    agreed = None if trust or config is not None else tuple(overrides)
    if config is not None:
        settings = load_config(config, overrides)
    elif isinstance(content.get("config"), dict):
        layers = Layers(str(path))
        layers.add(content["config"], str(path))
        layers.add_overrides(overrides)
        settings = Config.from_dict(layers.data, layers.source, written=True)
        refuse_foreign_network(settings.student, section_of(settings), path, agreed)
    else:
        raise UserError(f"{path}: does not say which network it is of; --config <file> does")
    device = choose_device(settings.training.device)
    set_up(settings)
    source = None
    if not images:
        with suppress(KeyError):  # written by others, or before checkpoints said all of it
            source = Source.of(content["data"])
    if source is None:
        is_named = agreed is None or any(word.startswith("dataset.root=") for word in overrides)
        with nullcontext() if is_named else without_downloads():
            source = readable_part(open_data(settings.dataset), settings.dataset, settings.training.num_workers)
    return Restored(path, settings, content, source, device, agreed)


def section_of(config: Config) -> str:
    """Where the network that is trained stands."""
    return "kd.student" if config.kd else "model"
