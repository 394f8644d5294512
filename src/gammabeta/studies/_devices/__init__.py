"""Several devices in one process, and in real ones."""
