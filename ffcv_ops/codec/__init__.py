"""JPEG bytes to planes and pixels, and back."""
