"""The embedded world and the three small models trained on it."""
