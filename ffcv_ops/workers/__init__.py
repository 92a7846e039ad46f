"""Share the work of writing and checking among processes and machines."""
