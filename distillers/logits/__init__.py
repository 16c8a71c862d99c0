"""What can be matched at the logits, one file each."""

from distillers.logits.registry import LOGIT_LOSSES, register_logit_loss

__all__ = ["LOGIT_LOSSES", "register_logit_loss"]
