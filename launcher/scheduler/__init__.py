"""Slurm and local processes: the only callers of squeue, sacct, scontrol and scancel, and what their words mean."""
