"""Images, views and masks: from files to batches. Knows no model."""

from locat_lightning.data.images import ImageData
from locat_lightning.data.masks import SegmentationData
from locat_lightning.data.multicrop import MultiCropData

__all__ = ["ImageData", "MultiCropData", "SegmentationData"]
