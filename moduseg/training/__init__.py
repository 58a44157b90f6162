"""One training loop for every model that is trained: `moduseg.training.loop.fit`."""
