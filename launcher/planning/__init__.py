"""Predict what a run needs before it is queued: memory of each stage, step time, and which layouts are best."""
