"""Empty on purpose: each reader loads its own format's package."""
