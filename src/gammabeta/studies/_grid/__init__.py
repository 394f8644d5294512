"""What the experiment on the grid compares."""
