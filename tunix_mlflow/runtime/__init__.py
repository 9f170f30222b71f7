"""Empty on purpose: its modules load before jax, except devices."""
