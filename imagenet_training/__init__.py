"""The model path: from a batch to a checkpoint."""
