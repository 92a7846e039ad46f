"""Images to one ``.beton`` file."""
