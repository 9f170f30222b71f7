"""Empty on purpose: evaluation is pure Python and imports no heavy package."""
