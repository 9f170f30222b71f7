"""Empty on purpose: each reader imports its own format's package."""
