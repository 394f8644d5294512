"""What the experiment on smoothness concludes, beside its own file."""
