"""The only modules that loop over a data set and touch files; each has `run(cfg) -> Path` and calls what it needs."""
