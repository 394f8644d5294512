"""Parts of the experiment on sensitivity; the protocol is in ``sensitivity``."""
