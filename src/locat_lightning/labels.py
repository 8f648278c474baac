"""Labels that mean the same in every room."""

IGNORE = 255  # of a pixel without a class: masks have 8 bits, so there are at most 255 classes, 0 to 254
