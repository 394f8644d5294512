"""What the experiment on weight decay trains; the protocol is in ``weight_decay``."""
