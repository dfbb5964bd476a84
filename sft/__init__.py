"""Data plane: tokenizes, masks, pads and trains SFTGPT on every rank. Never calls Slurm."""
