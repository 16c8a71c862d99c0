"""The keys that say how a network is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from utils.config.types import (
    AutoFlag,
    ClassWeights,
    Count,
    Device,
    Epochs,
    Flag,
    Incidental,
    Index,
    NotNegative,
    Number,
    Positive,
    Section,
    Text,
    Workers,
    spelt_like,
)

# All of torch.optim but LBFGS, which calls the network itself, and SparseAdam and Muon, which cannot train every layer.
Optimizer = Literal[
    "SGD", "AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "Adafactor", "Adagrad", "ASGD", "RMSprop", "Rprop"
]
MomentumFactor = Annotated[Number, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    name: Annotated[Optimizer, spelt_like(get_args(Optimizer))] = Field(
        "SGD", description="of torch.optim, for the student and the policy alike"
    )
    lr: Incidental[Positive | None] = Field(None, description="used where training.lr is absent")
    weight_decay: NotNegative = Field(5e-4, description="of a model trained alone")
    weight_decay_stage2: NotNegative = Field(5e-4, description="of the student and what its distiller trains")
    momentum: MomentumFactor = Field(0.9, description="of SGD")
    nesterov: Flag = Field(False, description="of SGD: Nesterov's momentum")
    weight_decay_agent: NotNegative = Field(1e-3, description="of the policy and the adapters")
    options: dict[Text, Any] = Field({}, description="further arguments of the optimiser, e.g. {betas: [0.9, 0.95]}")

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.data.get("name") != "SGD" or not info.data.get("momentum")):
            raise ValueError("must be false unless name is SGD and momentum above 0")
        return value


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
    schedule: Literal["steps", "cosine"] = Field(
        "steps",
        description="of both rates: the drops above, or a cosine from the warm-up to the last epoch",
    )
    clip_grad_norm: NotNegative = Field(
        0.0, description="largest norm of the gradient of the student and its distiller (0: any)"
    )
    label_smoothing: Annotated[NotNegative, Field(lt=1)] = Field(
        0.0, description="part of each target that is spread over all classes"
    )
    mixup: NotNegative = Field(0.0, description="mix images and labels in pairs; its alpha, customary 0.2 (0: off)")
    cutmix: NotNegative = Field(0.0, description="the same by rectangles, customary 1; with mixup: one or the other")
    class_weights: ClassWeights | None = Field(
        None,
        description="of the classes in the cross-entropy: balanced (in inverse proportion to their images), or a list",
    )
    ema_decay: MomentumFactor = Field(
        0.0,
        description="what a step leaves of the moving average of the student's weights (0: there is none)",
    )
    batch_size: Count = Field(64, description="images per step, over all devices together")
    num_workers: Incidental[Workers] = Field(4, description="processes that decode images")
    epochs: Count = Field(240, description="epochs in all")
    init_epoch: Index = Field(0, description="epoch to count from")
    warmup_epochs: Index = Field(0, description="first epochs, in which the learning rates rise linearly")
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
    gpu_preserve: Incidental[Any] = Field(False, description="accepted because published files carry it; no effect")
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

    @field_validator("init_epoch", "warmup_epochs")
    @classmethod
    def _before_the_end(cls, value: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs", value + 1)
        if value >= epochs:
            raise ValueError(f"must be less than training.epochs, which is {epochs}")
        return value


class ValidationConfig(Section):
    best_by: Literal["top1", "class_mean"] = Field(
        "top1", description="accuracy that chooses the best epoch: of all images, or the mean over the classes"
    )
    batch_size: Incidental[Count | None] = Field(
        None, description="images per evaluation step (default: 64; on a GPU up to 1000, fewer if they are large)"
    )
    num_workers: Incidental[Workers] = Field(4, description="processes that decode images")


class PretrainingOptimizerConfig(Section):
    name: Annotated[Literal["SGD"], spelt_like(["SGD"])] = Field("SGD", description="only SGD is implemented")
    lr: Positive = Field(0.01, description="learning rate")
    momentum: MomentumFactor = Field(0.9, description="momentum")
    weight_decay: NotNegative = Field(5e-4, description="weight decay")


class PretrainingConfig(Section):
    epochs: Count = Field(30, description="epochs of the distiller's own phase, if it has one")
    optimizer: PretrainingOptimizerConfig = PretrainingOptimizerConfig()
