"""From query vectors to a label map: search, vote, choice among masks, painting (docs/method.md, steps 6 to 8)."""
