"""The commands of `python -m launcher`, a family a module; each module's `add(commands)` declares its own.

Handlers import what they need: `status` should not pay for OmegaConf, nor `--help` for anything.
"""
