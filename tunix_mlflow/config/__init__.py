"""Empty on purpose: nobody who needs the schema waits for YAML."""
