"""What the experiment on the weights before BN trains; the protocol is in ``weight_norms``."""
