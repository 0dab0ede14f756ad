"""Runs with adapters from beginning to end: resumed, resharded, exported for PEFT, merged, and gone on with."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.checkpoint.sharded import open_checkpoint
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.training.inputs import model_digest
from megadpo.training.models import open_model
from megadpo.training.reference import reference_digest
from megadpo.training.setup import prepare
from megadpo.validation.load import load_config
from tests.helpers.checkpoints import load_reward_model
from tests.helpers.runs import (
    assert_same_weights,
    exported_weights,
    log_probs,
    run_settings,
    save_files,
    train_each,
    train_run,
)
from tests.helpers.worlds import run_world

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
SHORT = {"steps": 3, "pairs_per_step": 4, "warmup_steps": 1}
TOKENS = torch.arange(5, 40)[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "qwen2", 60, num_hidden_layers=2)


def of_run(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    adapter = LORA | changes.pop("adapter", {})
    return run_settings(files, output_dir, adapter=adapter, checkpoint={"every": 1}, train=SHORT, **changes)


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and `merged` are the same run; `broken` breaks off after step 2."""
    root = tmp_path_factory.mktemp("runs")
    run_world(1, train_run, of_run(files, root / "broken"), 2)
    whole = [of_run(files, root / "whole"), of_run(files, root / "merged", adapter={"merge": True})]
    run_world(1, train_each, whole)
    return root


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def in_peft(base: Path, adapter: Path, load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained) -> torch.Tensor:
    import peft

    return logits_of(peft.PeftModel.from_pretrained(load(base), adapter))


@pytest.mark.slow
def test_the_first_margins_are_zero_to_the_bit_and_the_reference_needs_no_model(runs: Path) -> None:
    first = json.loads((runs / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0 and first["rewards/chosen"] == 0.0
    assert "mode: adapter" in (runs / "whole" / "config.yaml").read_text()


def test_a_resumed_run_ends_with_the_same_bits(files: Path, runs: Path) -> None:
    run_world(1, train_run, of_run(files, runs / "broken"))
    assert_same_weights(runs / "broken", runs / "whole")


def test_a_checkpoint_holds_adapters_only_and_says_of_which_model(files: Path, runs: Path) -> None:
    checkpoint = open_checkpoint(runs / "whole" / "checkpoints" / "step_00000002")
    names = set(checkpoint.source("weights").names())
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert set(checkpoint.source("exp_avg").names()) == names
    assert checkpoint.state["adapter"]["base_model_name_or_path"] == str(files / "model")


def test_peft_reads_hf_and_gives_the_logits_of_the_merged_model(files: Path, runs: Path) -> None:
    ours = in_peft(files / "model", runs / "whole" / "hf")
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    assert (ours - logits_of(base)).abs().max() > 1e-2, "something was learned"
    for merged in (runs / "merged" / "hf", merge_of(runs / "whole" / "hf", runs / "merged-by-convert")):
        assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(merged)), ours, atol=1e-4)


def merge_of(adapter: Path, out: Path) -> Path:
    merge_adapter(adapter, out)
    return out


def test_both_ways_to_merge_give_the_same_bits(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    merge_adapter(runs / "whole" / "hf", tmp_path / "other" / "hf")
    assert_same_weights(tmp_path / "other", runs / "merged")


def test_the_last_checkpoint_exports_to_the_same_directory(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "whole" / "checkpoints" / "step_00000003", tmp_path / "hf")
    files = {path.name for path in (runs / "whole" / "hf").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files and "config.json" not in files
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == {
        path.name: path.read_bytes() for path in (runs / "whole" / "hf").iterdir() if path.name != "README.md"
    }, "all but the model card, which tells of a run"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["PEFT directory", "checkpoint"])
def test_log_probs_of_an_adapter_are_those_of_the_merged_model(way: str, files: Path, runs: Path, tmp_path: Path) -> None:
    adapter = runs / "whole" / ("hf" if way == "PEFT directory" else "checkpoints/step_00000003")
    for name, model in (("adapter", adapter), ("merged", runs / "merged" / "hf")):
        run_world(1, log_probs, model, files / "eval.jsonl", tmp_path / name, {}, True, tmp_path / "cache")
    assert (tmp_path / "adapter").read_text() == (tmp_path / "merged").read_text()


@pytest.mark.slow
def test_an_adapter_goes_on_as_model_path_and_as_adapter_path_alike(files: Path, runs: Path, tmp_path: Path) -> None:
    adapter = runs / "whole" / "hf"
    plain, two = {"kind": "lora"}, {"reference": {"adapter": str(adapter)}, "train": SHORT | {"steps": 2}}
    both = [
        run_settings(files, tmp_path / "a", adapter=plain, model={"path": str(adapter)}, **two),
        run_settings(files, tmp_path / "b", adapter=plain | {"path": str(adapter)}, **two),
        run_settings(files, tmp_path / "c", adapter=plain | {"path": str(adapter)}, train=SHORT | {"steps": 1}),
    ]
    first, second, without = run_world(1, train_each, both)[0]
    assert first == second and first[0]["rewards/margins"] == 0.0, "the reference is the adapter that the run begins with"
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert without[0]["rewards/margins"] != 0.0, "without reference.adapter it is the base"


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, pytest.param({"pipeline": 2}, marks=pytest.mark.exhaustive), {"engine": "deepspeed", "zero_stage": 3}],
    ids=["TP2", "PP2", "ZeRO-3"],
)
def test_a_run_goes_on_in_another_layout_and_exports_the_same(
    parallel: dict[str, Any], files: Path, runs: Path, tmp_path: Path
) -> None:
    begun = of_run(files, tmp_path / "run")
    run_world(1, train_run, begun, 2)
    run_world(2, train_run, begun | {"parallel": parallel})
    ours, theirs = exported_weights(tmp_path / "run"), exported_weights(runs / "whole")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=2e-5), name
    merged = begun | {"parallel": parallel, "adapter": LORA | {"merge": True}}
    run_world(2, train_run, merged)  # nothing is left to train
    for name, tensor in exported_weights(runs / "merged").items():
        assert torch.allclose(exported_weights(tmp_path / "run")[name], tensor, rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "parallel"),
    [
        (False, {"tensor": 2}),
        (True, {"pipeline": 2}),
        pytest.param(True, {"engine": "deepspeed", "zero_stage": 3}, marks=pytest.mark.exhaustive),
    ],
    ids=["untied, TP2", "tied, PP2", "tied, ZeRO-3"],
)
def test_adapters_of_embedding_and_head_go_on_in_another_layout_and_are_exported_and_merged(
    tied: bool, parallel: dict[str, Any], tmp_path: Path
) -> None:
    files = save_files(tmp_path, "qwen2", 40, num_hidden_layers=2, tie_word_embeddings=tied)
    ends = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    whole = [of_run(files, tmp_path / "whole", adapter=ends), of_run(files, tmp_path / "run", adapter=ends)]
    first = run_world(1, train_run, whole[0])[0]
    assert first[0]["rewards/margins"] == 0.0 and first[-1]["rewards/margins"] != 0.0
    run_world(1, train_run, whole[1], 2)
    run_world(2, train_run, whole[1] | {"parallel": parallel})
    ours, theirs = exported_weights(tmp_path / "run"), exported_weights(tmp_path / "whole")
    assert {"base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_B.weight"} <= ours.keys()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=2e-5), name
    adapter = Path(shutil.copytree(tmp_path / "run" / "hf", tmp_path / "adapter"))
    merged = whole[1] | {"parallel": parallel, "adapter": LORA | ends | {"merge": True}}
    run_world(2, train_run, merged)  # nothing is left to train
    merge_adapter(adapter, tmp_path / "by-convert" / "hf")
    assert_same_weights(tmp_path / "run", tmp_path / "by-convert")
    expected = in_peft(files / "model", adapter)
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(files / "model"))).abs().max() > 1e-2
    for out in (tmp_path / "run" / "hf", tmp_path / "by-convert" / "hf"):
        assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4)
    for name, model in (("by-adapter", adapter), ("by-merged", tmp_path / "run" / "hf")):
        run_world(1, log_probs, model, files / "eval.jsonl", tmp_path / name, {}, True, tmp_path / "cache")
    assert (tmp_path / "by-adapter").read_text() == (tmp_path / "by-merged").read_text()


@pytest.mark.slow
def test_adapters_of_experts_are_gathered_from_the_ranks_that_have_them(tmp_path: Path) -> None:
    files = save_files(tmp_path, "mixtral", 40, num_hidden_layers=2)
    parallel = {"parallel": {"expert": 2}}
    runs = [
        of_run(files, tmp_path / "plain", **parallel),
        of_run(files, tmp_path / "merged", adapter={"merge": True}, **parallel),
        of_run(files, tmp_path / "cut", parallel={"tensor": 2, "expert_tensor": 2}),
    ]
    if importlib.util.find_spec("deepspeed") is not None:
        zero = {"engine": "deepspeed", "expert": 2}
        runs += [of_run(files, tmp_path / f"zero {stage}", parallel=zero | {"zero_stage": stage}) for stage in (1, 3)]
        # Whole experts, none of which is trained.
        attention = {"target_modules": ["q_proj", "o_proj"]}
        runs.append(of_run(files, tmp_path / "attention", adapter=attention, parallel=zero | {"zero_stage": 2}))
    run_world(2, train_each, runs)
    for other in ("cut", "zero 1", "zero 3"):
        if (tmp_path / other).exists():
            found = exported_weights(tmp_path / other)
            for name, tensor in exported_weights(tmp_path / "plain").items():
                assert torch.allclose(found[name], tensor, rtol=1e-3, atol=2e-5), (other, name)
    names = {f"base_model.model.model.layers.1.block_sparse_moe.experts.{n}.w2.lora_B.weight" for n in range(4)}
    assert names <= exported_weights(tmp_path / "plain").keys()
    ours = in_peft(files / "model", tmp_path / "plain" / "hf")
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "hf")), ours, atol=1e-4)


@pytest.mark.slow
def test_a_reward_model_s_adapter_brings_its_head(files: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    objective = {"loss_type": "reward"}
    both = [
        of_run(files, tmp_path / "plain", objective=objective),
        of_run(files, tmp_path / "merged", objective=objective, adapter={"merge": True}),
    ]
    run_world(1, train_each, both)
    config = json.loads((tmp_path / "plain" / "hf" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]
    base = AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=1)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "plain" / "hf")
    model.config.pad_token_id = 1
    ours = logits_of(model)
    assert torch.allclose(ours, logits_of(load_reward_model(tmp_path / "merged" / "hf")), atol=1e-4)
    merge_adapter(tmp_path / "plain" / "hf", tmp_path / "by-convert")
    assert torch.allclose(ours, logits_of(load_reward_model(tmp_path / "by-convert")), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": {"target_modules": ["query"]}}, "adapter.target_modules: 'query' is no linear layer of this model"),
        ({"adapter": {"layers_to_transform": [2]}}, "names layer 2, but the model has layers 0 to 1"),
        ({"adapter": {"path": "nowhere"}}, "adapter.path: there is no directory nowhere"),
        ({"adapter": {"path": "{files}/model"}}, "is no PEFT directory (it has no adapter_config.json), nor a checkpoint"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], sentence: str, files: Path, tmp_path: Path
) -> None:
    adapter = {name: value.format(files=files) if name == "path" else value for name, value in changes["adapter"].items()}
    kept = {"kind": "lora"} if "path" in adapter else LORA
    settings = run_settings(files, tmp_path / "run", adapter=kept | adapter)
    with pytest.raises(UserError) as caught:
        prepare(load_config(settings))
    assert sentence in str(caught.value)


def test_a_run_does_not_go_on_with_other_adapters(files: Path, runs: Path, tmp_path: Path) -> None:
    checkpoint = {"resume": str(runs / "whole" / "checkpoints" / "step_00000002")}
    for changes, sentence in (
        ({"adapter": LORA | {"alpha": 9.0}}, "its adapters have lora_alpha 8, and this run's 9"),
        ({}, "is of a run that trains adapters, and this one trains the whole model"),
    ):
        from megadpo.training.resume import settle_checkpoint

        settings = run_settings(files, tmp_path / "run", checkpoint=checkpoint, **changes)
        with pytest.raises(UserError, match=sentence):
            setup = prepare(load_config(settings))
            settle_checkpoint(setup.search, setup.origin)


def test_an_adapter_of_another_model_is_refused(runs: Path, tmp_path: Path) -> None:
    other = save_files(tmp_path / "other", "qwen2", 20, num_hidden_layers=2, seed=1)
    adapter = {"kind": "lora", "path": str(runs / "whole" / "hf")}
    with pytest.raises(UserError, match=r"whose files are not those of .*other/model; use the model that it was trained on"):
        prepare(load_config(run_settings(other, tmp_path / "run", adapter=adapter)))
    smaller = save_files(tmp_path / "smaller", "qwen2", 20, num_hidden_layers=2, hidden_size=32)
    with pytest.raises(UserError, match=r"has shape \[4, 64\], but with this model .* \[4, 32\]; the adapter belongs to"):
        prepare(load_config(run_settings(smaller, tmp_path / "run", adapter=adapter)))


def test_a_reference_that_is_the_adapter_trained_on_is_not_its_base(files: Path, runs: Path, tmp_path: Path) -> None:
    adapter = str(runs / "whole" / "hf")
    changes = {"model": {"path": adapter}, "reference": {"path": adapter}}
    setup = prepare(load_config(run_settings(files, tmp_path / "auto", adapter={"kind": "lora"}, **changes)))
    assert setup.config.reference.adapter == adapter and setup.reference_adapter is not None
    changes["reference"]["mode"] = "resident"
    setup = prepare(load_config(run_settings(files, tmp_path / "resident", adapter={"kind": "lora"}, **changes)))
    assert setup.reference.merged == adapter and setup.policy.merged is None


def test_another_alpha_makes_another_model_for_caches_and_resumed_runs(runs: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs / "whole" / "hf", tmp_path / "other"))
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 9.0}))
    models = [open_model(str(path), "reference.path", Config()) for path in (runs / "whole" / "hf", other)]
    for digest in (reference_digest, model_digest):
        assert len({digest(model) for model in models}) == 2
