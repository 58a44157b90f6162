"""From query vectors to a label map: search, vote, choice among masks, rasterisation."""
