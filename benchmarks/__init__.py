"""One file per claim. `python -m benchmarks.<name>` prints a table and, as its last line, one flat JSON object."""
