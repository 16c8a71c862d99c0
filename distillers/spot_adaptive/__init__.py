"""The method: a policy that chooses, per sample and per step, where a distiller distils."""
