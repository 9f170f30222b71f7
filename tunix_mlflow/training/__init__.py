"""Empty on purpose: nothing here is needed before jax is."""
