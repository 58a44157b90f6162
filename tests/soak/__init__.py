"""A long run of accidents; `python -m tests.soak`."""
