"""From a validated config to what is trained: networks, tasks, optimisers."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from datasets import Data, Loader, Source, check_batches, make_loader, readable_part
from distillers.label_loss import LabelLoss
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.spot_adaptive.join import join
from distillers.task import Classification, Pretraining, Task
from models import StagedModel, get_model, is_short_name
from models.libraries import expected_images, offered_weights
from utils.config import Config, ModelConfig
from utils.errors import UserError, doing
from utils.processes.group import rank, world_size
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.resume import refuse_other_classes
from utils.run_folder.weights import assign_weights, load_weights, take_weights
from utils.training.accuracy import evaluate
from utils.training.average import WeightAverage
from utils.training.cuda_graph import choose_recorder
from utils.training.device import set_up
from utils.training.log import log
from utils.training.meter import accuracy_text
from utils.training.optim import check_options, make_optimizers
from utils.training.precision import autocast, refuse_precision
from utils.training.step import Phase

VALIDATION_PIXELS = 2**20  # of the images that a GPU evaluates at once: 1000 images of 32x32, 64 of 128x128 and larger


def build(config: Config, source: Source, device: torch.device) -> tuple[Task, Source]:
    """Seed PyTorch, and build what the config trains on the host; find what is wrong before anything that takes long.

    Returns:
        the task, and its data: with ``dataset.on_corrupt: skip``, every image has been decoded once, and those that
        cannot be read are left out.

    Raises:
        UserError: something does not exist, does not fit together, or cannot be done on the device.
    """
    training = config.training
    check_batches(source, training.batch_size, val_batch_size(config, device, source), world_size())
    refuse_precision(device, training.precision)
    check_options(training.optimizer)

    def make(source: Source) -> Task:
        set_up(config)
        return synchronize_batchnorm(build_task(config, source), config, device)

    task = make(source)
    choose_recorder(training.cuda_graph, device, task)  # refuses a graph that is asked for and not possible
    readable = readable_part(source, config.dataset, training.num_workers)
    if len(readable.labels) < len(source.labels):
        task = make(readable)  # a distiller may keep something of every image
    return task, readable


def load_data(source: Source, config: Config, device: torch.device) -> Data:
    """Both loaders of the config's data set, on `device`."""
    return Data(source, *(load_split(source, config, device, split) for split in ("train", "val")))


def load_split(source: Source, config: Config, device: torch.device, split: str) -> Loader:
    """The loader of a split on `device`, for this process's part of the images."""
    if split == "train":
        size, workers = config.training.batch_size, config.training.num_workers
    else:
        size, workers = val_batch_size(config, device, source), config.validation.num_workers
    how = {"seed": config.training.seed, "device": device, "shard": (rank(), world_size())}
    return make_loader(source, config.dataset, split, size, workers, **how)


def val_batch_size(config: Config, device: torch.device, source: Source) -> int:
    """``validation.batch_size``, or what suits the device: no figure depends on it."""
    height, width = source.image_size
    on_gpu = max(64, min(1000, VALIDATION_PIXELS // (height * width)))
    return config.validation.batch_size or (on_gpu if device.type == "cuda" else 64)


def build_task(config: Config, source: Source) -> Task:
    """What the config trains: one network under cross-entropy, or a student under a teacher whose weights are random.

    No image is decoded for it, and no file of the teacher's is needed.
    """
    kd = config.kd
    # The student comes first: it starts from the same weights whatever the distiller and the selection are.
    network = config.student
    student = build_network(network, source)
    if network.checkpoint:
        name = f"the student {network.title}" if kd else network.title
        section = "kd.student" if kd else "model"
        load_weights(student, Path(network.checkpoint), name, new_head=network.new_head, **prefix_of(network, section))
    else:
        load_offered_weights(student, network, source)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(f"model {network.name!r}: has nothing to train, all its parameters have requires_grad=False")
    if kd is None:
        return Classification(student, make_label_loss(config, source))
    return assemble(config, student, build_network(kd.teacher, source), source)


def load_offered_weights(student: StagedModel, network: ModelConfig, source: Source) -> None:
    """Give `student` the weights of timm or torchvision that its keyword arguments ask for, if they do."""
    name = f"model {network.name!r}"
    try:
        weights = offered_weights(network.name, network.kwargs, source.num_classes, new_head=network.new_head)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if weights is not None:
        hint = "" if network.new_head else " (new_head=true trains a new classifier)"
        assign_weights(student, weights, f"{name}: its weights do not fit{hint}", new_head=network.new_head)
        here, there = source.describe(), expected_images(network.name, network.kwargs)
        if changes := [f"{key} {value}, here {here[key]}" for key, value in there.items() if here[key] != value]:
            words = " ".join(
                f"dataset.{key}={value}".replace(" ", "") for key, value in there.items() if key in "mean std"
            )
            log.warning(f"{name}: its weights know images prepared in another way: {'; '.join(changes)} ({words})")


def load_teacher(teacher: StagedModel, config: Config, source: Source) -> None:
    """Give the teacher its weights.

    Raises:
        UserError: they are not there, not this network's, or were trained on other classes.
    """
    network, path = config.kd.teacher, config.teacher_checkpoint
    title = f"the teacher {network.title}"
    content = read_checkpoint(path)
    refuse_other_classes(content, source, f"{path}: {title}")
    take_weights(teacher, content, path, title, **prefix_of(network, "kd.teacher"))


def prefix_of(network: ModelConfig, section: str) -> dict[str, str | None]:
    """The arguments of `take_weights` that say which of several sets of weights in a file is meant."""
    return {"prefix": network.checkpoint_prefix, "key": f"{section}.checkpoint_prefix"}


def teacher_accuracy(task: SpotAdaptiveDistillation, config: Config, data: Data, device: torch.device) -> float:
    """Top-1 accuracy of the teacher on the validation images, in percent.

    Raises:
        UserError: its logits are not finite.
    """
    accuracy = evaluate(task.teacher, data.val, device, autocast(device, config.training.precision))
    if not math.isfinite(accuracy["loss/total"]):
        raise UserError(
            f"{config.teacher_checkpoint}: the logits of the teacher {config.kd.teacher.title} for the validation "
            "images are not finite; train it anew, e.g. with a smaller training.lr, or name another by "
            "kd.teacher.checkpoint=<file>"
        )
    log.info(f"teacher {config.kd.teacher.title}: {accuracy_text(accuracy)}")
    return accuracy["top1"]


def make_phases(task: Task, config: Config) -> list[Phase]:
    """The training of `task`, after the distiller's own phase if it has one."""
    decay = config.training.ema_decay
    average = WeightAverage(task.student, decay) if decay else None
    parts = [("train", task, config.training.epochs)]
    distiller = getattr(task, "distiller", None)
    if distiller is not None and distiller.pretraining_parameters(task.student):
        parts.insert(0, ("pretrain", Pretraining(task.student, task.teacher, distiller), config.pretrain.epochs))
    return [
        Phase(name, part, epochs, make_optimizers(part.parameter_groups(), config), average)
        for name, part, epochs in parts
    ]


def assemble(config: Config, student: StagedModel, teacher: StagedModel, source: Source) -> SpotAdaptiveDistillation:
    """Join the networks by the config's distiller and selection."""
    kd, loss = config.kd, config.kd_loss
    return join(
        student,
        teacher,
        loss.name,
        labels=source.labels,
        image_size=source.image_size,
        options=loss.options,
        spots=loss.spots,
        feat_dim=loss.feat_dim,
        logits=loss.logits,
        logits_options=loss.logits_options,
        standardize=loss.standardize,
        temperature=loss.KD_T,
        homogeneous=loss.homo,
        alpha=kd.loss_weights.kd_weight,
        beta=kd.loss_weights.other_kd,
        gamma=kd.loss_weights.classify_weight,
        selection=kd.selection,
        policy=kd.policy,
        policy_options=kd.policy_options,
        balance=kd.balance,
        warmup_epochs=kd.warmup_epochs,
        gate_temperature=kd.gate_temperature,
        routing_share=kd.routing_share,
        pair=f"{kd.teacher.title}-{kd.student.title}",
        label_loss=make_label_loss(config, source),
    )


def make_label_loss(config: Config, source: Source | None = None) -> LabelLoss:
    """The config's cross-entropy; the data is needed for ``training.class_weights``.

    Raises:
        UserError: there are weights of another number of classes.
    """
    training, weights = config.training, config.training.class_weights
    if weights == "balanced":
        counts = source.labels.bincount(minlength=source.num_classes)
        weights = len(source.labels) / (source.num_classes * counts.clamp(min=1)).float()
    elif weights is not None:
        if len(weights) != source.num_classes:
            raise UserError(
                f"training.class_weights: found {len(weights)} weights, and there are {source.num_classes} classes"
            )
        weights = torch.tensor(weights)
    return LabelLoss(training.label_smoothing, training.mixup, training.cutmix, weights)


def build_network(config: ModelConfig, source: Source) -> StagedModel:
    """The network that the config names, for the classes and images of the data.

    Raises:
        UserError: there is none, or it does not turn these images into one logit for each class.
    """
    name, size = config.name, source.image_size
    model = get_model(name, source.num_classes, stages=config.stages, kwargs=config.kwargs, image_size=size)
    if not is_short_name(name):  # it has been run when it was cut
        return model
    with doing(f"model {name!r}: running it on images of {'x'.join(map(str, size))}"):
        _, logits = model.shapes(*size)
    if logits != (source.num_classes,):
        raise UserError(
            f"model {name!r}: gives logits of shape {logits} for an image, and the data has {source.num_classes} "
            "classes; its last layer must have the width `num_classes`, with which it is called"
        )
    return model


def synchronize_batchnorm(task: Task, config: Config, device: torch.device) -> Task:
    """With ``training.sync_bn``, let every BatchNorm layer normalise by the statistics of all processes together.

    Parameters and buffers stay the same tensors, so optimisers and the student's frozen twin need not know.
    """
    if not config.training.sync_bn:
        return task
    if device.type != "cuda":
        raise UserError(f"training.sync_bn: needs GPUs, PyTorch has it for no other device, and this is the {device}")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(task) if world_size() > 1 else task
