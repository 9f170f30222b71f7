"""Empty on purpose: duckdb, numpy and pyarrow load only where they are used."""
