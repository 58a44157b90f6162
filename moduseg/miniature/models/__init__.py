"""The three small models of the embedded world."""
