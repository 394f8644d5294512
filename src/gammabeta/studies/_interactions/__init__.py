"""Parts of the experiment on simultaneous updates; the protocol is in ``interactions``."""
