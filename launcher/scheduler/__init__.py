"""Schedulers behind one protocol (`base`): Slurm and local processes, chosen by name in `factory`."""
