"""Read images from the places that they come from."""
