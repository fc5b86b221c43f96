"""A run folder: its files, lock, status and checks, and training in this process."""
