"""Attention of text-to-image models."""
