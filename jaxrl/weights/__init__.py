"""The border to Hugging Face names: checkpoints in, complete Hugging Face folders out."""
