"""Low-rank adapters beside the linear layers of a frozen model: what they are, in PEFT's terms."""
