"""Empty on purpose: each suite imports what it measures, and no other one does."""
