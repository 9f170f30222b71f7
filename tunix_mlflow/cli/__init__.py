"""Empty on purpose: a command loads what it needs inside its body."""
