"""Distillers of the logits alone. Each names its loss in `distillers.logits`; that of KD is the default, `kl`."""

from __future__ import annotations

from distillers.base import Distiller
from distillers.registry import register_distiller


@register_distiller("kd")
class KD(Distiller):
    """Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.

    It has no spots. Every distillation has a loss at the logits, which `SpotAdaptiveDistillation` computes.
    """

    logits_only = True
    published_spots = ()


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
