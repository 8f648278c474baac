"""Images, views and masks: from files to batches. Knows no model."""

from locat_lightning.data.images import ImageData

__all__ = ["ImageData"]
