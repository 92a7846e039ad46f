"""Write images as one ``.beton`` file."""
