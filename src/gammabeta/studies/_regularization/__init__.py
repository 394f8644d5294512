"""What the experiment on regularization measures beside its own file."""
