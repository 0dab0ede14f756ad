"""A run whose adapters begin as a part of the model: decomposed once, by all ranks together."""

from __future__ import annotations

import time
from dataclasses import replace

from megadpo.checkpoint.merged import MemorySource, MergedSource
from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.adapters.initial import NewAdapter
from megadpo.training.console import log
from megadpo.training.models import AdapterFiles, Begun
from megadpo.training.setup import RunSetup


def begin_with_parts(setup: RunSetup) -> RunSetup:
    """The set-up with what `adapter.init: pissa` or `olora` begins with; any other as it is. Collective.

    The reference is the model that training begins with, which is the model itself but for rounding: the same frozen weights
    with the same adapters, so that the first margins are zero to the last bit. A run that goes on decomposes anew.
    """
    if setup.adapter is None or setup.adapter.spec.init not in DECOMPOSED:
        return setup
    from megadpo.model.adapters.decomposed import beginnings  # asks for a joined world

    spec, policy, began = setup.adapter.spec, setup.policy, time.perf_counter()
    tensors = beginnings(spec, policy.source)
    log(f"{spec.init}: {len(spec.modules):,} matrices decomposed in {time.perf_counter() - began:,.0f} s")
    begun = MemorySource(tensors)
    new = NewAdapter(spec, policy.shape, setup.config.train.seed, policy.source, tensors)
    return replace(
        setup,
        begun=Begun(tensors, MergedSource(policy.source, begun, replace(spec, modules_to_save=()), factor=-1.0)),
        adapter=AdapterFiles(spec, new, is_new=True),
        reference_adapter=AdapterFiles(spec, begun, is_new=False),
    )
