"""Figures by matplotlib, made without pyplot: a `matplotlib.figure.Figure` that loggers and files take.

`grid`: columns of tiles (`Column`, `grid`, `image_column`, `heat_column`, `feature_column`, `rgb`).
`names`: class names in figures, in any script that the machine has a font for (`Names`).
`validation`: what a model makes of images (`validation_figure`, `kernel_columns`).
`segmentation`: classes of pixels (`painted`, `class_column`, `class_legend`,
`segmentation_figure`, `iou_figure`, `confusion_figure`).
`views`: what self-supervision learns from (`views_figure`).
"""
