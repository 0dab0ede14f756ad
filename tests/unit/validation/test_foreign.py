"""Options as other trainers call them are answered with ours, never with the nearest spelling."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megadpo.config.foreign import TRAINERS, answer
from megadpo.config.schema import Config
from megadpo.config.strict import all_keys
from megadpo.errors import UserError
from megadpo.validation.load import load_config

ROOT = Path(__file__).parents[3]
KEYS = set(all_keys(Config))
SECTIONS = "|".join(field.name for field in dataclasses.fields(Config))
LEAVES = {key.rpartition(".")[2] for key in KEYS}


def refusal(text: str) -> str:
    with pytest.raises(UserError) as refused:
        load_config({}, [text])
    return str(refused.value)


@pytest.mark.slow
def test_every_field_of_trl_s_configuration_typed_as_a_key_is_ours_or_answered_with_ours_or_with_the_reason() -> None:
    trl = pytest.importorskip("trl")
    fields = [field.name for field in dataclasses.fields(trl.DPOConfig)]
    fields += [field.name for cls in (trl.KTOConfig, trl.RewardConfig, trl.SFTConfig) for field in dataclasses.fields(cls)]
    for name in dict.fromkeys(fields):
        for dotted in (name, f"train.{name}", f"objective.{name}"):
            if dotted in KEYS:
                continue
            said, known = refusal(f"{dotted}=1"), answer(name)
            if name in LEAVES:
                assert re.fullmatch(rf"command line: unknown key {dotted}; did you mean (\w+\.)?{name}\?", said), said
            else:
                assert known is not None, f"{name} has no entry in megadpo/config/foreign.py"
                assert said == f"command line: unknown key {dotted}: {known.sentence()}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train.per_device_train_batch_size=4", "is train.tokens_per_micro_batch here"),
        ("train.gradient_accumulation_steps=8", "is train.tokens_per_micro_batch here"),
        ("train.gradient_checkpointing=true", "is train.recompute here"),
        ("train.bf16=true", "is model.dtype here"),
        ("train.fp16=true", "bf16 or fp32"),
        ("train.lr_scheduler_type=cosine", "is train.schedule here"),
        ("warmup_ratio=0.1", "did you mean train.warmup_ratio?"),
        ("train.max_grad_norm=1.0", "is train.clip_norm here"),
        ("train.save_total_limit=2", "is checkpoint.keep here"),
        ("objective.rpo_alpha=1.0", "is objective.nll_coef here"),
        ("objective.cpo_alpha=1.0", "is objective.nll_coef here"),
        ("data.max_prompt_length=512", "is data.max_length here (with data.truncation"),
        ("lora.r=8", "r of PEFT is adapter.rank here"),
        ("peft_config=x", "is adapter.kind here"),
        ("--pref-beta=0.1", "is objective.beta here"),
        ("policy.megatron_cfg.tensor_model_parallel_size=2", "is parallel.tensor here"),
        ("push_to_hub=true", "is hub.push here (OWNER/NAME)"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(typed: str, said: str) -> None:
    assert said in refusal(typed)


def test_a_section_from_elsewhere_in_a_file_is_answered_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  path: m\nlora:\n  r: 8\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: unknown key lora: lora of PEFT is adapter here")):
        load_config(path)


def test_every_key_that_is_named_exists_and_every_entry_says_something() -> None:
    for trainer, table in TRAINERS.items():
        for name, (key, words) in table.items():
            assert key in KEYS if key else words, f"{trainer}: {name}"
            named = re.findall(rf"\b(?:{SECTIONS})\.[a-z_]\w*", words)
            assert set(named) <= KEYS, f"{trainer}: {name}"


def test_the_documentation_is_made_of_the_same_tables() -> None:
    from tools.foreign_table import PART, render

    assert PART.written() == render(), "run: python -m tools.foreign_table --write"
