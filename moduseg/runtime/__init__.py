"""Artefact folders, devices, weights, construction of backends from configuration."""
