"""Frozen linear layers whose weights are held in 4 bits (QLoRA, arXiv:2305.14314)."""
