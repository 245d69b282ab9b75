"""Image sets with their conditions: embedded `shapes` and `digits`, and any TFDS set of labelled images."""
