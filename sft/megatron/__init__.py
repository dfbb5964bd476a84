"""Megatron-core as this project uses it: import, corrections, layers, model, optimizer, groups."""
