"""Low-rank adapters beside the linear layers and the embedding of a frozen model: what they are, in PEFT's terms."""
