"""What a run writes for people to read: lines, records, curves, pages."""
