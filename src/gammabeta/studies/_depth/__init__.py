"""The networks of the experiment on depth, and what it measures before any training."""
