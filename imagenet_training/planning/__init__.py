"""From settings to the arithmetic of a run, without a model or data."""
