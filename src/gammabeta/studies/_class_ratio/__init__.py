"""What the experiment on class ratios concludes, beside its own file."""
