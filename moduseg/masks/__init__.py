"""Geometry of masks: run lengths, bits, cells, polygons."""
