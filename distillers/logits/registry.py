"""The names under which losses at the logits are known."""

from utils.registry import Registry

LOGIT_LOSSES: Registry = Registry("loss at the logits", "distillers.logits")
register_logit_loss = LOGIT_LOSSES.register
