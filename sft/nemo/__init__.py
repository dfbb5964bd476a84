"""Convert NeMo checkpoints into Hugging Face directories, and those into NeMo 2 checkpoints."""
