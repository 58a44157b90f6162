"""Experiments that run the stages many times."""
