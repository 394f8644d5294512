"""What is measured in the experiment on inference."""
