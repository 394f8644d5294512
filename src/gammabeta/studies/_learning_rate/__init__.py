"""What the experiment on learning rates measures, one file for each of its parts."""
