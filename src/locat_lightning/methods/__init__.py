"""Self-supervision: a file for each method."""

from locat_lightning.methods.dino import Dino

__all__ = ["Dino"]
