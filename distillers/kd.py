"""Distillers of nothing but the logits. What each matches there is the loss of the same name in `distillers.logits`."""

from __future__ import annotations

from distillers.base import Distiller, Setting
from distillers.registry import register_distiller
from utils.errors import UserError


@register_distiller("kd")
class KD(Distiller):
    """Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.

    It has no spots. Its one term, the divergence of the softened predictions, is part of every distillation
    and belongs to the wrapper.

    Raises:
        UserError: the user chose spots.
    """

    logits_only = True
    published_spots = ()

    def __init__(self, setting: Setting):
        if setting.spots:
            name = type(self).__name__.lower()
            raise UserError(
                f"kd_loss.spots: {name} distils the logits alone; leave the spots out or name another distiller"
            )
        super().__init__(setting)


@register_distiller("dkd")
class DKD(KD):
    logit_loss = "dkd"


@register_distiller("dist")
class DIST(KD):
    logit_loss = "dist"


@register_distiller("nkd")
class NKD(KD):
    logit_loss = "nkd"


@register_distiller("wttm")
class WTTM(KD):
    logit_loss = "wttm"
