"""Parts of the experiment on recipes; the protocol is in ``recipe``."""
