"""The reports of a run for people to read: lines, records, curves, pages."""
