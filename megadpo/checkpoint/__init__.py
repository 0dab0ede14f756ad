"""Models and training state on disk: Hugging Face directories and our own checkpoints, read in slices."""
