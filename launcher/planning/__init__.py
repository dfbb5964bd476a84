"""What a run would need and take, before it is queued: memory of each stage, step time, and which layouts are best."""
