"""Empty on purpose: scoring is pure Python and loads nothing."""
