"""Reward models on disk: read, made of a language model, carried through checkpoints, and loaded by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.export import finish_export, plan_export, write_export_files
from megadpo.checkpoint.hf import hf_directory, open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.reward_model import RewardModel, as_reward_model, refuse_reward_model
from megadpo.checkpoint.sharded import begin, commit, open_checkpoint, open_weights, write_shard_file
from megadpo.errors import UserError
from megadpo.model.families import check_tensors, head_of, logical_shapes, shape_of, shard_parameters
from megadpo.model.families.fill import fill_shard
from tests.helpers.checkpoints import assert_same, load_reward_model, tensors_of
from tests.helpers.families import WIDE, DictSource
from tests.helpers.models import hh_rows, save_model, save_reward_model, save_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {"dtype": torch.bfloat16},
    "qwen3 tied": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 16},
}


def opened(directory: Path, seed: int = 0) -> RewardModel:
    config, source = read_hf_config(directory), open_weights(directory)
    check_tensors(shape_of(config), source)
    return as_reward_model(config, source, hf_directory(directory), seed)


def export(model: RewardModel, directory: Path, source_dir: Path) -> Path:
    """What the end of a training run writes."""
    plan = plan_export(model.config, torch.float32, stages=[range(2), range(2, 4)])
    begin(directory)
    tensors = ((name, model.source.read(name, 0, 0, shape[0])) for name, shape in plan.shapes.items())
    write_export_files(plan, directory, tensors)
    finish_export(plan, directory, source_dir)
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_a_reward_model_goes_through_a_checkpoint_bit_for_bit(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    model = save_reward_model(tmp_path / "model", name.split()[0], tokenizer=False, **WIDE, **MODELS[name])
    import_hf(model, tmp_path / "checkpoint", *layout)
    assert_same(tensors_of(tmp_path / "checkpoint"), tensors_of(model))
    assert len(open_checkpoint(tmp_path / "checkpoint").tensors["weights"]["score.weight"]["pieces"]) == 1
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(model))
    before, after, tokens = load_reward_model(model), load_reward_model(tmp_path / "hf"), torch.arange(7)[None]
    assert after.config.to_dict() == before.config.to_dict() | {"_name_or_path": after.config._name_or_path}
    assert torch.equal(after(tokens).logits, before(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_becomes_a_reward_model_that_transformers_loads(family: str, tied: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family, tie_word_embeddings=tied)
    reward_model = opened(model)
    assert reward_model.has_new_head and head_of(reward_model.config) == "reward"
    assert set(reward_model.source.names()) == set(logical_shapes(shape_of(reward_model.config)))
    exported = export(reward_model, tmp_path / "hf", model)
    loaded, body = load_reward_model(exported), load_file(model / "model.safetensors")
    assert type(loaded).__name__.endswith("ForSequenceClassification")
    for name, tensor in loaded.state_dict().items():
        expected = reward_model.source.read(name, 0, 0, 1) if name == "score.weight" else body[name]
        assert torch.equal(tensor, expected), name
    settings = json.loads((exported / "config.json").read_text())
    assert settings["id2label"] == {"0": "LABEL_0"} and settings["label2id"] == {"LABEL_0": 0}
    assert settings["pad_token_id"] == AutoTokenizer.from_pretrained(exported).pad_token_id == 1
    assert not opened(exported, seed=9).has_new_head, "the export is a reward model to go on from"


def test_a_batch_of_real_rows_padded_by_the_tokenizer_gives_each_rows_own_reward(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    exported = export(opened(model), tmp_path / "hf", model)
    loaded, tokenizer = load_reward_model(exported), AutoTokenizer.from_pretrained(exported)
    texts = [row["chosen"][:200] + ending for row, ending in zip(hh_rows(4), ("", "</s>", "", "</s>"), strict=True)]
    with torch.no_grad():
        batch = loaded(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([loaded(**tokenizer([text], return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)


def test_a_new_head_depends_on_the_seed_alone_and_has_the_models_deviation(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=False, initializer_range=0.5, hidden_size=256)
    score = opened(model, seed=3).source.read("score.weight", 0, 0, 1)
    assert score.shape == (1, 256) and 0.4 < score.std() < 0.6 and abs(score.mean()) < 0.1
    assert torch.equal(score, opened(model, seed=3).source.read("score.weight", 0, 0, 1))
    assert not torch.equal(score, opened(model, seed=4).source.read("score.weight", 0, 0, 1))


def test_training_state_of_a_reward_model_made_of_a_language_model_stands_alone(tmp_path: Path) -> None:
    model, directory = save_model(tmp_path / "model", tie_word_embeddings=True), tmp_path / "step_00000001"
    config = opened(model).config
    state = {
        kind: DictSource({name: torch.randn(shape) for name, shape in logical_shapes(shape_of(config)).items()})
        for kind in ("weights", "exp_avg")
    }
    begin(directory)
    manifests = []
    for stage in range(2):
        for rank in range(2):
            shards = [(kind, shard) for kind in state for shard in shards_of(config, stage, rank)]
            items = [(kind, shard, torch.empty(shard.shape)) for kind, shard in shards]
            for kind, shard, tensor in items:
                fill_shard(shard, state[kind], tensor)
            manifests.append(write_shard_file(directory, f"pp{stage:02d}-tp{rank:02d}", items))
    with pytest.raises(ValueError, match=r"config knows no score\.weight"):
        commit(directory, manifests, {}, model)
    commit(directory, manifests, {"step": 1, "dtype": "float32"}, model, config)
    for kind, source in state.items():
        found = open_checkpoint(directory).source(kind)
        assert_same({name: found.read(name, 0, 0, found.shape(name)[0]) for name in found.names()}, source.tensors)
    again = opened(directory)
    assert not again.has_new_head and again.config.num_labels == 1 and again.config.pad_token_id == 1
    export_checkpoint(directory, tmp_path / "hf")
    assert_same(load_reward_model(tmp_path / "hf").state_dict(), state["weights"].tensors)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "</s>"


def shards_of(config: Any, stage: int, rank: int) -> list[Any]:
    """What a rank of a world with two stages of two tensor ranks holds."""
    return shard_parameters(
        shape_of(config),
        tensor_rank=rank,
        num_tensor=2,
        layers=range(2 * stage, 2 * stage + 2),
        has_embedding=stage == 0,
        has_head=stage == 1,
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"pad_token": "<s>"}, 0),
        ({"pad_token": None}, 1),
        ({"pad_token": "<|pad|>"}, 1),  # beyond the model's rows: transformers could not load it
    ],
)
def test_the_padding_token_is_the_tokenizers_if_the_model_has_a_row_for_it_else_the_end_of_sequence(
    tokens: dict[str, str | None], expected: int, tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path)
    model = save_model(tmp_path / "model", tokenizer=False, vocab_size=len(tokenizer))
    tokenizer.pad_token = None
    if tokens["pad_token"]:
        tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(model)
    reward_model = opened(model)
    assert reward_model.config.pad_token_id == expected
    load_reward_model(export(reward_model, tmp_path / "hf", model))


def test_without_a_tokenizer_the_configs_tokens_decide(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=False, eos_token_id=[5, 6])
    assert opened(model).config.pad_token_id == 5
    change_config(model, pad_token_id=8)
    assert opened(model).config.pad_token_id == 8


def test_a_reward_model_keeps_its_own_padding_token(tmp_path: Path) -> None:
    model = save_reward_model(tmp_path / "model", pad_token_id=7)
    assert AutoTokenizer.from_pretrained(model).pad_token_id == 1 and opened(model).config.pad_token_id == 7


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model", tokenizer=False)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_a_classifier_of_several_labels_is_refused(model: Path) -> None:
    change_config(model, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(UserError, match=r"config\.json: .*LlamaForSequenceClassification with 2 labels.* has one"):
        read_hf_config(model)


def test_a_classifier_whose_config_names_no_labels_is_refused_as_transformers_reads_it(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in ("id2label", "label2id")}))
    with pytest.raises(UserError, match="2 labels"):
        read_hf_config(model)


def test_log_probs_of_a_reward_model_are_refused_with_what_to_do(model: Path) -> None:
    with pytest.raises(UserError, match=r"reference\.path: m is a reward model \(Llama.*no lm_head.*loss_type"):
        refuse_reward_model(read_hf_config(model), "reference.path: m")
    refuse_reward_model(read_hf_config(save_model(model.parent / "lm", tokenizer=False)), "model.path: lm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop("score.weight"), r"no tensor score\.weight of shape \[1, 64\]"),
        (lambda held: held.update({"score.weight": torch.zeros(2, 64)}), r"score\.weight has shape \[2, 64\].*\[1, 64\]"),
        (lambda held: held.update({"score.bias": torch.zeros(1)}), r"does not know, the first is score\.bias"),
        (lambda held: held.update({"lm_head.weight": torch.zeros(499, 64)}), r"does not know, the first is lm_head"),
    ],
)
def test_weights_that_do_not_fit_a_reward_model_are_named(change: Any, words: str, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, str(model / "model.safetensors"))
    with pytest.raises(UserError, match=words):
        check_tensors(shape_of(read_hf_config(model)), open_hf(model))
