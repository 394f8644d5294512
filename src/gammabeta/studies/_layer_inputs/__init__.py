"""What the experiment on layer inputs trains and measures: drift, and kinds of normalization."""
