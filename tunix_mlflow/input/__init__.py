"""Empty on purpose: rows of tokens need NumPy alone."""
