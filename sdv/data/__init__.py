"""Files on a disk -> checked rows -> batches."""
