"""The embedded world: scenes drawn from a seed, and their VOC folders."""

from moduseg.miniature.world.scenes import CLASSES, WorldConfig, render_scene

__all__ = ["CLASSES", "WorldConfig", "render_scene"]
