"""Empty on purpose: importing a tokenizer loads what it needs."""
