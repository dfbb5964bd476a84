"""The commands of `python -m launcher`: a module for each family, whose `add(commands)` declares them.

Handlers import what they need, so that `status` does not wait for OmegaConf, nor `--help` for anything.
"""
