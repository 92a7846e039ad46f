"""Processes and machines that share the work of writing and checking."""
