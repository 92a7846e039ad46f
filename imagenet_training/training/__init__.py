"""Steps and epochs: the trainer, its losses and meters, and the early end."""
