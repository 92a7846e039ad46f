"""The data of a recipe: its files, their classes, and the batches for training and evaluation."""
