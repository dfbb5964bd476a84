"""Cluster files: write a first one from what Slurm says, and check one against its cluster."""
