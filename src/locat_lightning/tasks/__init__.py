"""LightningModules: what is trained, by which loss."""

from locat_lightning.tasks.classification import Classification
from locat_lightning.tasks.dino import Dino

__all__ = ["Classification", "Dino"]
