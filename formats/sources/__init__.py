"""Checkpoints of other programs, read as one description: Hugging Face folders, GGUF files, bitsandbytes weights."""
