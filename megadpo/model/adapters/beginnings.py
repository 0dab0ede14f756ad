"""How an adapter may begin (`adapter.init`), without what these need to be done."""

DECOMPOSED = ("pissa", "olora")
"""Those whose adapters begin as a part of the frozen weights."""
