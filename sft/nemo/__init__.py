"""NeMo 1.x checkpoints -> Hugging Face directories, from which any topology starts."""
