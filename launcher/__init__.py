"""Control plane: checks, renders, submits and follows fine-tuning runs. Imports neither torch nor transformers."""

__version__ = "0.1.0"
