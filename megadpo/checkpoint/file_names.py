"""What the files of a model's weights are called, in the order in which transformers and we look for them."""

SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
BIN_NAME, BIN_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
