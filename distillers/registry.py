"""The names of what a file in this folder can add."""

from utils.registry import Registry

DISTILLERS: Registry = Registry("distiller", "distillers")
LOGIT_LOSSES: Registry = Registry("loss at the logits", "distillers")
POLICIES: Registry = Registry("policy", "distillers", "distillers.spot_adaptive.policy")
register_distiller = DISTILLERS.register
register_logit_loss = LOGIT_LOSSES.register
register_policy = POLICIES.register
