"""What the experiment on costs measures; the protocol is in ``cost``."""
