"""Models: architectures, their weights, and layers in forms that compute faster."""
