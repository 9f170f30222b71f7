"""Empty on purpose: DuckDB is imported by the modules that use it.

All SQL of the project is in this package. The canonical text of an example is what counts; every
other column is derived from it, in SQL, when it is stored, and again when it is verified.
"""
