"""Slurm: the only callers of sbatch, squeue, sacct, scontrol, scancel and sinfo, and what their answers mean."""
