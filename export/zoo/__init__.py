"""The default model: its architecture, its training script and its weights."""
