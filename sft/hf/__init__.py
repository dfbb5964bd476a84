"""Hugging Face directories: what they hold, read into Megatron-core and written from it."""
