"""What the small fits train and measure: one module per kind of network."""
