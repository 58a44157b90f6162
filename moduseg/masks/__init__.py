"""Geometry of masks: run lengths, bits, cells, id maps, polygons."""
