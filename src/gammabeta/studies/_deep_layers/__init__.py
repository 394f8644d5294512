"""What the experiment on deep layers trains: networks with heads, and layers over time."""
