"""Images, views and masks: from files to batches. Knows no model."""

from locat_lightning.data.classification import ImageData
from locat_lightning.data.depth import DepthData
from locat_lightning.data.masked_views import MaskedMultiCrop
from locat_lightning.data.multiview import MultiViewData
from locat_lightning.data.segmentation import SegmentationData
from locat_lightning.data.single_crop import SingleCrop
from locat_lightning.data.videos import VideoData

__all__ = [
    "DepthData",
    "ImageData",
    "MaskedMultiCrop",
    "MultiViewData",
    "SegmentationData",
    "SingleCrop",
    "VideoData",
]
