"""Options of adapters: which reference they bring, and what contradicts them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from megadpo.errors import UserError
from megadpo.training.output_dir import claim_output_dir
from megadpo.validation.load import load_config
from megadpo.validation.quantization import check_quantization_machine

LORA, NF4 = "adapter.kind=lora", "model.quantization=nf4"


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ([], "resident"),
        (["objective.loss_type=simpo"], "none"),
        (["objective.loss_type=reward", LORA], "none"),
        ([LORA], "adapter"),
        ([LORA, "model.path=m", "reference.path=m"], "adapter"),
        ([LORA, "model.path=m", "reference.path=other"], "resident"),
        ([LORA, "reference.mode=precomputed"], "precomputed"),
        ([LORA, "schedule.reference=interleaved", "schedule.name=1f1b", "parallel.pipeline=2"], "adapter"),
    ],
)
def test_auto_is_the_reference_that_losses_and_adapters_ask_for(overrides: list[str], mode: str) -> None:
    assert load_config({}, overrides).reference.mode == mode


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.rank=8"], "adapter.rank has no effect with adapter.kind none; set adapter.kind to lora or remove it"),
        (["adapter.merge=true"], "adapter.merge has no effect with adapter.kind none"),
        ([LORA, "adapter.rank=0"], "adapter.rank must be at least 1, got 0"),
        ([LORA, "adapter.alpha=0"], "adapter.alpha must be greater than 0"),
        ([LORA, "adapter.alpha=.inf"], "adapter.alpha must be greater than 0"),
        ([LORA, "adapter.dropout=1"], "adapter.dropout must be in [0, 1), got 1.0"),
        ([LORA, "adapter.dropout=.nan"], "adapter.dropout is nan, which is no number"),
        ([LORA, "adapter.layers_to_transform=[]"], "give each layer's number once, from 0, or null for all layers"),
        (
            [LORA, "adapter.layers_to_transform=[1,1]"],
            "adapter.layers_to_transform is [1, 1]; give each layer's number once",
        ),
        ([LORA, "adapter.layers_to_transform=[-1]"], "adapter.layers_to_transform is [-1]; give each layer's number once"),
        ([LORA, "adapter.layers_to_transform=[1]", "adapter.target_modules=.*q_proj"], "put the layers into the pattern"),
        (
            [LORA, "adapter.path=p", "adapter.rank=8"],
            "adapter.rank is 8, but the adapter of ",
        ),
        ([LORA, "adapter.init=loftq"], "megadpo (what it trains makes up for the error of 4 bits, and so"),
        (
            ["adapter.kind=qlora"],
            "under that name (it is adapter.kind lora with model.quantization nf4)",
        ),
        ([LORA, "adapter.init=pissa", "adapter.use_dora=true"], "adapter.init is pissa with adapter.use_dora, whose"),
        ([LORA, NF4, "adapter.init=olora"], "adapter.init is olora with model.quantization nf4: what is left of the"),
        ([LORA, "adapter.init=pissa", "reference.adapter=p"], "reference.adapter is p, an adapter of the whole model, but"),
        (
            ["model.quantization=nf4"],
            "model.quantization is nf4, but weights in 4 bits are frozen, and without adapters they",
        ),
        ([LORA, "model.quantization=fp4"], "model.quantization: 'fp4' is not available in this version"),
        ([LORA, "model.quantization_block_size=128"], "model.quantization_block_size has no effect with model.quantization"),
        ([LORA, "model.double_quantization=false"], "model.double_quantization has no effect with model.quantization none"),
        ([LORA, NF4, "model.quantization_block_size=48"], "model.quantization_block_size is 48; choose one of: 32, 64, 128"),
        (
            [LORA, NF4, "adapter.merge=true"],
            "take no adapter in: set it to false, and after the run add the adapter to the model as it was: megadpo convert",
        ),
        (
            [LORA, NF4, "parallel.engine=deepspeed", "parallel.zero_stage=3"],
            "parallel.zero_stage is 3, which cuts parameters",
        ),
        (["adapter.kind=dora"], "adapter.kind: 'dora' is not known; choose one of: none, lora"),
        (["reference.mode=adapter"], "but adapter.kind is none; use resident, or set adapter.kind to lora"),
        ([LORA, "reference.mode=adapter", "reference.path=other"], "reference.path is other, but reference.mode adapter is"),
        ([LORA, "reference.mode=resident", "reference.adapter=p"], "which only reference.mode adapter reads, not resident"),
        ([LORA, "objective.loss_type=simpo", "reference.adapter=p"], "which only reference.mode adapter reads, not none"),
        ([LORA, "reference.sync_every=4"], "reference.sync_every is 4, but no model is held beside that with adapters"),
        (
            [LORA, "model.layers=transformer_engine"],
            "model.layers is transformer_engine, but adapters are built beside local",
        ),
        (
            [LORA, "reference.tokens_per_micro_batch=9"],
            "only for reference.mode precomputed: a reference that is adapter runs",
        ),
    ],
)
def test_what_contradicts_adapters_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config({}, overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_of_a_version_without_adapters_goes_on(tmp_path: Path) -> None:
    config = load_config({"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": str(tmp_path)}).resolved()
    written = yaml.safe_load(config.to_yaml())
    del written["adapter"], written["reference"]["adapter"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    claim_output_dir(tmp_path, config)
    config.adapter.kind = "lora"
    with pytest.raises(UserError, match=r"holds a different run \(adapter\.kind was 'none', now 'lora'\)"):
        claim_output_dir(tmp_path, config)


def test_a_machine_without_bitsandbytes_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config({}, [LORA, NF4])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"model\.quantization is nf4, but the package bitsandbytes is not installed; install"
    ):
        check_quantization_machine(config)
