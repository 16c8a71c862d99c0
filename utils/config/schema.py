"""The keys of a config, their defaults and meanings; those of the training are in `utils.config.training`.

The names are those of the published configs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from distillers.spot_adaptive.selection import SELECTIONS
from utils.config.errors import Key, validate
from utils.config.names import WRITTEN, model_label, registered, selection_label
from utils.config.training import PretrainingConfig, TrainingConfig, ValidationConfig
from utils.config.types import (
    Count,
    Deviations,
    Flag,
    Incidental,
    Index,
    Means,
    Name,
    NetworkName,
    NotNegative,
    Number,
    Pair,
    PathText,
    Positive,
    Section,
    Text,
    ValueRange,
)
from utils.registry import names_in_source
from utils.run_folder.layout import Layout

DatasetName = Annotated[Name, AfterValidator(registered("datasets", "dataset", "DATASETS"))]
DistillerName = Annotated[Name, AfterValidator(registered("distillers", "distiller", "DISTILLERS"))]
PolicyName = Annotated[Name, AfterValidator(registered("distillers", "policy", "POLICIES"))]
LogitLossName = Annotated[Name, AfterValidator(registered("distillers", "logit_loss", "LOGIT_LOSSES"))]


class DatasetConfig(Section):
    name: DatasetName = Field(description=f"{', '.join(names_in_source('datasets'))}, or your own")
    root: Incidental[PathText] = Field("data", description="folder that holds the data")
    label: Incidental[Name | None] = Field(
        None, validate_default=True, description="folder name in run/ and configs/ (default: dataset.name)"
    )
    img_h: Count | None = Field(None, description="image height (default: the data set's)")
    img_w: Count | None = Field(None, description="image width (default: the data set's)")
    num_classes: Annotated[Count, Field(ge=2)] | None = Field(None, description="classes (default: the data set's)")
    loader: Incidental[Literal["auto", "memory", "stream"]] = Field(
        "auto", description="hold all images on the training device, or stream them through workers"
    )
    augment: Literal["auto", "crop_flip", "crop", "flip", "resized_crop", "trivialaugment", "none"] = Field(
        "auto", description="training augmentation (auto: the data set's)"
    )
    on_corrupt: Literal["error", "skip"] = Field(
        "error", description="refuse images that cannot be read, or decode all once and leave those out"
    )
    val_split: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of every class that validates, where no images do (folders and tables)",
    )
    sampler: Literal["shuffled", "balanced"] = Field(
        "shuffled", description="every training image once per epoch, or all classes equally often"
    )
    image_range: ValueRange | None = Field(
        None, description="values that become black and white in images of 16 or 32 bits (default: 0 and 65535)"
    )
    image_column: Text | None = Field(None, description="of a table (default: image, img, path, ...)")
    label_column: Text | None = Field(None, description="of a table (default: label, labels, class, ...)")
    mean: Means | None = Field(None, description="of each channel, of pixels from 0 to 1 (default: the data set's)")
    std: Deviations | None = Field(None, description="of each channel, of pixels from 0 to 1 (default: the data set's)")

    @field_validator("label", mode="before")
    @classmethod
    def _follow_name(cls, label: Any, info: ValidationInfo) -> Any:
        return info.data.get("name") if label is None else label


class ModelConfig(Section):
    name: NetworkName = Field(
        description="a model of models/, timm/<name>, or an import path, e.g. torchvision.models.resnet34"
    )
    label: Incidental[Name | None] = Field(
        None, description="folder name in run/, and name in reports (default: name, followed by kwargs)"
    )
    checkpoint: PathText | None = Field(None, description="weights to start from")
    checkpoint_prefix: Text | None = Field(
        None, description="the set of weights to take from a checkpoint with several that fit, e.g. teacher"
    )
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
    checkpoint: Incidental[PathText | None] = Field(
        None, description="its weights (default: the best of its own training)"
    )

    @model_validator(mode="after")
    def _head_of_the_file(self) -> TeacherConfig:
        if self.checkpoint and self.new_head:
            raise ValueError(
                "found new_head beside checkpoint, which is of a teacher that is trained; "
                "train_single.sh model.checkpoint=<file> model.new_head=true trains one"
            )
        return self


class LossWeights(Section):
    classify_weight: Positive = Field(1.0, description="gamma of the routing loss")
    kd_weight: NotNegative = Field(1.0, description="alpha, weight of the loss at the logits")
    other_kd: NotNegative | None = Field(None, description="beta, weight of the distiller (default: its own)")


class DistillationConfig(Section):
    teacher: TeacherConfig
    student: ModelConfig
    loss_weights: LossWeights = LossWeights()
    selection: Literal[tuple(SELECTIONS)] = Field(
        "adaptive",
        description="where to distil; " + ", ".join(f"{name}: {item.explanation}" for name, item in SELECTIONS.items()),
    )
    policy: PolicyName = Field(
        "gumbel", description=f"{', '.join(names_in_source('distillers', 'policy'))}, or your own"
    )
    policy_options: dict[Text, Any] = Field({}, description="keyword arguments of the policy's constructor")
    balance: Positive | None = Field(
        None,
        description="how hard each spot may pull at the student, in comparison with all that lies behind it, e.g. 0.5 "
        "(default: as hard as beta makes it)",
    )
    gate_temperature: Positive = Field(5.0, description="of the Gumbel-softmax gates")
    routing_share: Annotated[Positive, Field(le=1)] = Field(
        1.0, description="part of each batch that is routed to train the policy: less is cheaper (published: all)"
    )
    warmup_epochs: Index | None = Field(
        None,
        description="epochs over which alpha and beta grow from the start "
        "(default: alpha under dkd 20, beta of reviewkd 20, else 0)",
    )


class DistillationLossConfig(Section):
    name: DistillerName = Field(description=f"{', '.join(names_in_source('distillers', 'distiller'))}, or your own")
    T: Incidental[Positive | None] = Field(
        None, description="stands in published files; used as KD_T where that is absent"
    )
    KD_T: Positive = Field(
        None, validate_default=True, description="temperature of the loss at the logits (default: T, else 4)"
    )
    homo: Flag = Field(False, description="teacher and student are of one family: almost all gates start at 1")
    feat_dim: Count = Field(128, description="width of the embeddings of CC and CRD")
    spots: list[Pair] | None = Field(
        None, description="pairs [student feature, teacher feature] (default: the distiller's own)"
    )
    options: dict[Text, Any] = Field({}, description="keyword arguments of the distiller's constructor")
    logits: LogitLossName | None = Field(
        None,
        description=f"what is matched at the logits: {', '.join(names_in_source('distillers', 'logit_loss'))}, or your "
        "own (default: kl; dkd, dist, nkd and wttm where that is the distiller)",
    )
    standardize: Flag = Field(False, description="bring each sample's logits to mean 0 and deviation 1 before it")
    logits_options: dict[Text, Any] = Field({}, description="options of the loss at the logits, see docs/method.md")

    @field_validator("KD_T", mode="before")
    @classmethod
    def _follow_T(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is not None else info.data.get("T") or 4.0


class RunConfig(Section):
    root: Incidental[PathText] = Field("run", description="folder for everything a run writes")


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

    @model_validator(mode="before")
    @classmethod
    def _without_idle_weight(cls, data: Any) -> Any:
        """Published files of a network alone carry a weight of the routing loss, 1, which has no meaning there."""
        match data:
            case {"model": dict(), "kd": {"loss_weights": {"classify_weight": 1, **more}, **others}, **rest}:
                if not (more or others or "kd_loss" in rest):
                    return {"model": data["model"], **rest}
        return data

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
    def from_dict(
        cls, data: dict[str, Any], source: str | Callable[[Key], str] = "checkpoint", *, written: bool = False
    ) -> Config:
        """Validate nested settings, e.g. what `to_dict` gave.

        Args:
            source: what errors call it, or a function that says where a key stands.
            written: by a run; names that are unknown by now are found where they are used.

        Raises:
            UserError: one line about the first thing that is wrong.
        """
        return validate(cls, data, source if callable(source) else lambda key: source, WRITTEN if written else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON, YAML or a checkpoint."""
        return self.model_dump(mode="json")

    @property
    def student(self) -> ModelConfig:
        """The network that is trained, alone or under a teacher."""
        return self.model or self.kd.student

    @property
    def title(self) -> str:
        """``"vgg13"``, ``"at, adaptive, vgg13 -> vgg8"``, or ``"at, adaptive by <policy>, ..."``."""
        if self.model:
            return self.model.title
        kd = self.kd
        where = selection_label(kd.selection, kd.policy)
        return f"{self.kd_loss.name}, {where}, {kd.teacher.title} -> {kd.student.title}"

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
