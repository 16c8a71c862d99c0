"""What is different between two configs, and which of it decides a result."""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from typing import Any

from utils.config.errors import all_fields
from utils.config.schema import Config
from utils.config.types import INCIDENTAL

# What a run without a policy does not use.
OF_A_POLICY = {"kd.policy", "kd.policy_options", "kd.gate_temperature", "kd.routing_share", "kd_loss.homo"}
OF_A_POLICY |= {"kd.loss_weights.classify_weight", "training.lr_agent", "training.lr_agent_decay_epochs"}
OF_A_POLICY |= {"training.optimizer.weight_decay_agent"}


def flatten(section: dict[str, Any], whole: Container[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted keys; what a key of `whole` holds stays one value."""
    flat = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        nested = isinstance(value, dict) and value and key not in whole
        flat |= flatten(value, whole, f"{key}.") if nested else {key: value}
    return flat


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with both values. A key that one side lacks is ignored.

    What a key holds is one value, e.g. all of ``kd_loss.options``, so that an option that is left out is a difference.
    """
    old, new = (flatten(config, whole=_keys()) for config in (before, after))
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as dotted keys, without those that the schema marks as `Incidental`.

    What a key holds stays one value, e.g. all of ``kd_loss.options``: two runs may have different ones.
    """
    incidental = _keys()
    return {key: value for key, value in flatten(config, whole=incidental).items() if not incidental.get(key, False)}


def deciding_changes(before: Any, after: dict[str, Any]) -> str:
    """``"kd_loss.feat_dim is 64, it was 128"``: what of `deciding_settings` has changed; empty if nothing has."""
    if not isinstance(before, dict):
        return ""
    changes = differences(deciding_settings(before), deciding_settings(after))
    return "; ".join(f"{key} is {new}, it was {old}" for key, (old, new) in changes.items())


@cache
def _keys() -> dict[str, bool]:
    """Every key of the schema, and whether it is incidental."""
    return {".".join(key): INCIDENTAL in field.metadata for key, field in all_fields(Config)}
