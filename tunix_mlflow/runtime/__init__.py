"""Empty on purpose: its modules load before jax, but for devices."""
