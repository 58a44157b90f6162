"""Attention of text-to-image models: image + prompt -> where each word looked, and which pixels belong together."""
