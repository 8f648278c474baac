"""Images, views and masks: from files to batches. Knows no model."""
