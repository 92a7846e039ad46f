"""The ``.beton`` file: layout, reading, checks, manifest."""
