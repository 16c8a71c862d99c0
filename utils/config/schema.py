"""Every key of a config, its default and what it means. The names are those of the published configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from utils.config.errors import Key, validate
from utils.config.names import dataset_name, distiller_name, model_label, optimizer_name
from utils.config.types import (
    AutoFlag,
    Count,
    Device,
    Epochs,
    Flag,
    FlagOrShare,
    Incidental,
    Index,
    Name,
    NotNegative,
    Number,
    Pair,
    Positive,
    PositiveTriple,
    Text,
    Triple,
    Workers,
)
from utils.registry import names_in_source
from utils.run_folder.layout import Layout

MomentumFactor = Annotated[Number, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of keys. Refuses keys it does not know; cannot be changed once it is validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_heading(cls, value: Any) -> Any:
        """A heading with nothing under it means the defaults."""
        return {} if value is None else value


class DatasetConfig(Section):
    name: Name = Field(description=f"{', '.join(names_in_source('datasets'))}, or your own")
    root: Incidental[Text] = Field("data", description="folder that holds the data")
    label: Incidental[Name | None] = Field(
        None, validate_default=True, description="folder name in run/ and configs/ (default: dataset.name)"
    )
    img_h: Count | None = Field(None, description="image height (default: the data set's)")
    img_w: Count | None = Field(None, description="image width (default: the data set's)")
    num_classes: Annotated[Count, Field(ge=2)] | None = Field(None, description="classes (default: the data set's)")
    loader: Incidental[Literal["auto", "memory", "stream"]] = Field(
        "auto", description="hold all images on the training device, or stream them through workers"
    )
    augment: Literal["auto", "crop_flip", "crop", "flip", "resized_crop", "none"] = Field(
        "auto", description="training augmentation (auto: the data set's)"
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error", description="refuse images that cannot be read, or decode all once and leave those out"
    )
    val_split: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="share of every class that validates, where the data is not split (imagefolder, csv, parquet)"
    )
    mean: Triple | None = Field(None, description="normalisation, three channels (default: the data set's)")
    std: PositiveTriple | None = Field(None, description="normalisation, three channels (default: the data set's)")

    _canonical = field_validator("name")(dataset_name)

    @field_validator("label", mode="before")
    @classmethod
    def _follow_name(cls, label: Any, info: ValidationInfo) -> Any:
        return info.data.get("name") if label is None else label


class OptimizerConfig(Section):
    name: Text = Field("SGD", description="only SGD is implemented")
    lr: Incidental[Positive | None] = Field(None, description="used where training.lr is absent")
    weight_decay: NotNegative = Field(5e-4, description="of a model trained alone")
    weight_decay_stage2: NotNegative = Field(5e-4, description="of the student and what its distiller trains")
    momentum: MomentumFactor = Field(0.9, description="of all optimisers")
    weight_decay_agent: NotNegative = Field(1e-3, description="of the policy and the adapters")

    _known = field_validator("name")(optimizer_name)


class TrainingConfig(Section):
    optimizer: OptimizerConfig = OptimizerConfig()
    lr: Positive = Field(None, validate_default=True, description="learning rate (default: optimizer.lr, else 0.05)")
    lr_agent: Positive = Field(
        None, validate_default=True, description="learning rate of policy and adapters (default: training.lr / 2)"
    )
    lr_decay_epochs: Epochs = Field((150, 180, 210), description="epochs after which the learning rate drops")
    lr_agent_decay_epochs: Epochs = Field(
        None, validate_default=True, description="the same for lr_agent (default: lr_decay_epochs)"
    )
    lr_decay_rate: Annotated[Positive, Field(le=1)] = Field(0.1, description="factor of each drop, for both")
    batch_size: Count = Field(64, description="images per step, over all devices together")
    num_workers: Incidental[Workers] = Field(4, description="processes or threads that read images")
    epochs: Count = Field(240, description="epochs in all")
    init_epoch: Index = Field(0, description="epoch to count from")
    seed: Index = Field(1029, description="decides initialisation, order, augmentation")
    save_ep_freq: Incidental[Count | None] = Field(None, description="also keep a checkpoint of every so many epochs")
    keep_checkpoints: Incidental[Count | None] = Field(
        None, description="of these, how many to leave, the newest (default: all)"
    )
    save_every_steps: Incidental[Count | None] = Field(
        None, description="write last.pth inside an epoch, every so many steps"
    )
    gate_samples_freq: Incidental[Count | None] = Field(
        None, description="write each sample's gate counts every so many epochs, besides after the last one"
    )
    print_iter_freq: Incidental[Count] = Field(100, description="steps between two log lines")
    gpu_preserve: Incidental[FlagOrShare] = Field(
        False, description="accepted because published files carry it; no effect"
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field("fp32", description="of the networks; losses keep float32")
    device: Incidental[Device] = Field("auto", description="auto, cpu, cuda or cuda:N")
    channels_last: Incidental[AutoFlag] = Field(
        "auto", description="memory layout of maps (auto: on a CPU, on a GPU if not fp32)"
    )
    cuda_graph: Incidental[AutoFlag] = Field(
        "auto", description="replay a training step as one CUDA graph (auto: where possible)"
    )
    deterministic: Incidental[Flag] = Field(False, description="bit-equal reruns, slower on a GPU")
    sync_bn: Flag = Field(False, description="BatchNorm statistics over all devices")

    @field_validator("lr", "lr_agent", "lr_agent_decay_epochs", mode="before")
    @classmethod
    def _follow(cls, value: Any, info: ValidationInfo) -> Any:
        """Keys that follow another one unless they are given. (If that one is wrong, its own error counts.)"""
        if value is not None:
            return value
        done = info.data
        if info.field_name == "lr":
            return getattr(done.get("optimizer"), "lr", None) or 0.05
        return done.get("lr", 1.0) / 2 if info.field_name == "lr_agent" else done.get("lr_decay_epochs", ())

    @field_validator("init_epoch")
    @classmethod
    def _before_the_end(cls, value: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs", value + 1)
        if value >= epochs:
            raise ValueError(f"must be less than training.epochs, which is {epochs}")
        return value


class ValidationConfig(Section):
    batch_size: Incidental[Count] = Field(64, description="images per evaluation step")
    num_workers: Incidental[Workers] = Field(4, description="processes or threads that read images")


class ModelConfig(Section):
    name: Name = Field(description="a model of models/, or the import path of one, e.g. torchvision.models.resnet34")
    label: Incidental[Name | None] = Field(
        None, description="folder name in run/, and name in reports (default: name, followed by kwargs)"
    )
    checkpoint: Text | None = Field(None, description="weights to start from")
    stages: list[list[Text]] | None = Field(
        None, description="for an import path: the submodules that make up each stage, in order"
    )
    kwargs: dict[Text, Any] = Field({}, description="keyword arguments of the model's constructor")
    new_head: Flag = Field(False, description="leave the checkpoint's classifier out and train a new one")

    @property
    def title(self) -> str:
        """What it is called in folders, reports and messages, see `utils.config.names.model_label`."""
        return model_label(self.name, self.kwargs, self.label)


class TeacherConfig(ModelConfig):
    checkpoint: Incidental[Text | None] = Field(None, description="its weights (default: the best of its own training)")


class LossWeights(Section):
    classify_weight: Positive = Field(1.0, description="gamma of the routing loss")
    kd_weight: NotNegative = Field(1.0, description="alpha, weight of the KL term on the logits")
    other_kd: NotNegative | None = Field(None, description="beta, weight of the distiller (default: its own)")


class DistillationConfig(Section):
    teacher: TeacherConfig
    student: ModelConfig
    loss_weights: LossWeights = LossWeights()
    selection: Literal["adaptive", "anti", "fixed", "random"] = Field(
        "adaptive", description="where to distil: the policy's choice, its opposite, everywhere, or a coin's"
    )
    gate_temperature: Positive = Field(5.0, description="of the Gumbel-softmax gates")
    routing_share: Annotated[Positive, Field(le=1)] = Field(
        1.0, description="part of each batch that is routed to train the policy: less is cheaper (published: all)"
    )


class DistillationLossConfig(Section):
    name: Name = Field(description=f"{', '.join(names_in_source('distillers'))}, or your own")
    T: Incidental[Positive | None] = Field(
        None, description="stands in published files; used as KD_T where that is absent"
    )
    KD_T: Positive = Field(None, validate_default=True, description="temperature of the KL term (default: T, else 4)")
    homo: Flag = Field(False, description="teacher and student are of one family: gates start at the teacher's side")
    feat_dim: Count = Field(128, description="width of the embeddings of CC and CRD")
    spots: list[Pair] | None = Field(
        None, description="pairs [student feature, teacher feature] (default: the distiller's own)"
    )
    options: dict[Text, Any] = Field({}, description="keyword arguments of the distiller's constructor")

    _canonical = field_validator("name")(distiller_name)

    @field_validator("KD_T", mode="before")
    @classmethod
    def _follow_T(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is not None else info.data.get("T") or 4.0


class PretrainingOptimizerConfig(Section):
    name: Text = Field("SGD", description="only SGD is implemented")
    lr: Positive = Field(0.01, description="learning rate")
    momentum: MomentumFactor = Field(0.9, description="momentum")
    weight_decay: NotNegative = Field(5e-4, description="weight decay")

    _known = field_validator("name")(optimizer_name)


class PretrainingConfig(Section):
    epochs: Count = Field(30, description="epochs of the distiller's own phase, if it has one")
    optimizer: PretrainingOptimizerConfig = PretrainingOptimizerConfig()


class RunConfig(Section):
    root: Incidental[Text] = Field("run", description="folder for everything a run writes")


class Config(Section):
    """One experiment: `model` is trained alone, or `kd.student` is distilled from `kd.teacher`."""

    dataset: DatasetConfig
    training: TrainingConfig = TrainingConfig()
    validation: ValidationConfig = ValidationConfig()
    model: ModelConfig | None = None
    kd: DistillationConfig | None = None
    kd_loss: DistillationLossConfig | None = None
    pretrain: PretrainingConfig = PretrainingConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _one_experiment(self) -> Config:
        if (self.model is None) == (self.kd is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(f"found {given} of model and kd, must be one: model trains alone, kd distils")
        if (self.kd is None) != (self.kd_loss is None):
            pair = "kd without kd_loss" if self.kd else "kd_loss without kd"
            raise ValueError(f"{pair}; the two go together: who teaches whom, and how")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str | Callable[[Key], str] = "checkpoint") -> Config:
        """Validate nested settings, e.g. what `to_dict` gave.

        Args:
            source: what errors call it, or a function that says where a key stands.

        Raises:
            UserError: one line about the first thing that is wrong.
        """
        return validate(cls, data, source if callable(source) else lambda key: source)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON, YAML or a checkpoint."""
        return self.model_dump(mode="json")

    @property
    def student(self) -> ModelConfig:
        """The network that is trained, alone or under a teacher."""
        return self.model or self.kd.student

    @property
    def title(self) -> str:
        """``"vgg13"``, or ``"at, adaptive, vgg13 -> vgg8"``."""
        if self.model:
            return self.model.title
        kd = self.kd
        return f"{self.kd_loss.name}, {kd.selection}, {kd.teacher.title} -> {kd.student.title}"

    @property
    def run_dir(self) -> Path:
        """Where this experiment writes: ``run/<label>/<seed>/...``."""
        if self.model:
            return self._seed_dir / self.model.title
        pair = f"{self.kd.teacher.title}-{self.kd.student.title}"
        return self._seed_dir / f"{self.kd.selection}-{self.kd_loss.name}" / pair

    @property
    def teacher_checkpoint(self) -> Path:
        """Weights of ``kd.teacher``: those the config names, else the best of its own training."""
        teacher = self.kd.teacher
        if teacher.checkpoint:
            return Path(teacher.checkpoint)
        return Layout(self._seed_dir / teacher.title).best

    @property
    def _seed_dir(self) -> Path:
        return Path(self.run.root) / self.dataset.label / str(self.training.seed)
