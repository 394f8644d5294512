"""What is trained in the experiment on population statistics."""
