"""`convert import --resize-vocabulary`: rows are kept, new ones are the mean of the others, as many as asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.hf import open_hf
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.resized import ResizedSource
from megadpo.errors import UserError
from tests.helpers.models import VOCAB_SIZE, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}])
def test_a_token_that_was_added_has_a_row_in_the_export(changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **changes)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(7)])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        UserError, match=rf"--resize-vocabulary is {VOCAB_SIZE}, but the tokenizer makes {VOCAB_SIZE + 7} ids"
    ):
        import_hf(model, tmp_path / "checkpoint", num_rows=VOCAB_SIZE)
    import_hf(model, tmp_path / "checkpoint", num_tensor=2, num_rows=512)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["mismatched_keys"] and not report["missing_keys"] and loaded.config.vocab_size == 512
    theirs = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.detach().clone() for name, tensor in theirs.named_parameters()}
    theirs.resize_token_embeddings(512, mean_resizing=False)
    for name, tensor in loaded.named_parameters():
        assert tensor.shape == theirs.get_parameter(name).shape
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(tensor, before[name])
            continue
        assert torch.equal(tensor[:VOCAB_SIZE], before[name])
        mean = before[name].double().mean(0).to(tensor.dtype)
        assert torch.equal(tensor[VOCAB_SIZE:], mean.expand(512 - VOCAB_SIZE, -1))


def test_rows_that_no_token_has_are_left_out_and_slices_are_the_tensor_s(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=False)
    stored = load_file(model / "model.safetensors")[EMBEDDING]
    for num_rows in (400, 600):
        source = ResizedSource(open_hf(model), num_rows)
        whole = source.read(EMBEDDING, 0, 0, num_rows)
        assert whole.shape == (num_rows, 64) and torch.equal(whole[:400], stored[:400])
        for start, length in ((0, 3), (390, 10), (num_rows - 5, 5), (100, num_rows - 100)):
            assert torch.equal(source.read(EMBEDDING, 0, start, length), whole[start : start + length])
        assert torch.equal(source.read(EMBEDDING, 1, 10, 20), whole[:, 10:30])
