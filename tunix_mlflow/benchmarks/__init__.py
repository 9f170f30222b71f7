"""Empty on purpose: one file per suite, loaded by the bench entry point."""
