"""Self-supervision: a file for each method, and what they share."""

from locat_lightning.methods.dino import Dino
from locat_lightning.methods.distillation import Distillation

__all__ = ["Dino", "Distillation"]
