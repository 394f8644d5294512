"""Parts of the experiment on attacks; the protocol is in ``attacks``."""
