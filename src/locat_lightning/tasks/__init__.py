"""LightningModules with labels: what is trained, by which loss."""

from locat_lightning.tasks.classification import Classification
from locat_lightning.tasks.depth import Depth
from locat_lightning.tasks.segmentation import Segmentation

__all__ = ["Classification", "Depth", "Segmentation"]
