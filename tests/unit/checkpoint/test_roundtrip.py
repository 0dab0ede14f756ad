"""Hugging Face -> checkpoint -> Hugging Face is exact, in every layout; any layout reads what any other wrote."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.export import finish_export, plan_export, write_export_files
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.sharded import begin, commit, open_checkpoint, open_weights, step_checkpoints, write_shard_file
from megadpo.errors import UserError
from megadpo.model.families import logical_shapes, shape_of, shard_parameters
from megadpo.model.families.fill import fill_shard
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.families import LLAMA3, WIDE
from tests.helpers.models import save_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3.1 tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama bf16": {"dtype": torch.bfloat16},
    "qwen2": {},
    "qwen2 tied bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "qwen3": {},
    "qwen3 tied": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 16},
    "mistral tied": {"tie_word_embeddings": True},
    "mixtral bf16": {"dtype": torch.bfloat16},
    "gemma2 tied": {"tie_word_embeddings": True},
    "gemma3_text bf16": {"dtype": torch.bfloat16},
    "gpt_oss bf16": {"dtype": torch.bfloat16},
    "glm4_moe bf16": {"dtype": torch.bfloat16},
    "qwen3_next bf16": {"dtype": torch.bfloat16, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "llama4_text bf16": {"dtype": torch.bfloat16},
    "qwen3_moe tied": {"mlp_only_layers": [0, 3], "tie_word_embeddings": True},
}
FAMILY = {name: name.split()[0].removesuffix("3.1") for name in MODELS}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_model(root / name.replace(" ", "-"), FAMILY[name], tokenizer=False, **WIDE, **changes)
        for name, changes in MODELS.items()
    }


@pytest.fixture(scope="module")
def llama(model_dirs: dict[str, Path]) -> Path:
    return model_dirs["llama"]


@pytest.mark.parametrize("num_pipeline", [1, 2])
@pytest.mark.parametrize("num_tensor", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_gives_the_same_bits(
    name: str, num_tensor: int, num_pipeline: int, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    import_hf(model_dirs[name], tmp_path / "checkpoint", num_tensor, num_pipeline)
    assert_same(tensors_of(tmp_path / "checkpoint"), tensors_of(model_dirs[name]))
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(model_dirs[name]))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export_bit_for_bit_and_still_ties(
    name: str, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    import_hf(model_dirs[name], tmp_path / "checkpoint", 2, 2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    before = AutoModelForCausalLM.from_pretrained(model_dirs[name])
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert after.dtype is before.dtype
    assert_same(dict(after.named_parameters()), dict(before.named_parameters()))
    tied = bool(MODELS[name].get("tie_word_embeddings"))
    assert (after.lm_head.weight is after.model.embed_tokens.weight) is tied
    tokens = torch.arange(7)[None]
    assert torch.equal(after(tokens).logits, before(tokens).logits)


@pytest.mark.parametrize("layouts", [((4, 1), (2, 2)), ((2, 2), (4, 1)), ((1, 2), (2, 1))])
def test_a_checkpoint_of_one_layout_fills_the_shards_of_another(
    layouts: tuple[tuple[int, int], tuple[int, int]], llama: Path, tmp_path: Path
) -> None:
    (tensor, pipeline), (num_tensor, num_pipeline) = layouts
    import_hf(llama, tmp_path / "checkpoint", tensor, pipeline)
    config = read_hf_config(tmp_path / "checkpoint")
    per_stage = 4 // num_pipeline
    for stage in range(num_pipeline):
        for rank in range(num_tensor):
            for shard in shard_parameters(
                shape_of(config),
                tensor_rank=rank,
                num_tensor=num_tensor,
                layers=range(stage * per_stage, (stage + 1) * per_stage),
                has_embedding=stage == 0,
                has_head=stage == num_pipeline - 1,
            ):
                ours, theirs = torch.full(shard.shape, 7.0), torch.full(shard.shape, 8.0)
                fill_shard(shard, open_weights(tmp_path / "checkpoint"), ours)
                fill_shard(shard, open_hf(llama), theirs)
                assert torch.equal(ours, theirs), shard.name


def training_state(config: Any, rank: int, seed: int) -> list[Any]:
    """(kind, shard, tensor) of one of two tensor ranks; replicated parameters are equal on both."""
    shards = shard_parameters(
        shape_of(config), tensor_rank=rank, num_tensor=2, layers=range(4), has_embedding=True, has_head=True
    )
    items = []
    for number, (kind, shard) in enumerate((kind, shard) for kind in ("weights", "exp_avg") for shard in shards):
        torch.manual_seed(seed + number + (1000 * rank if shard.partition_dim is not None else 0))
        items.append((kind, shard, torch.randn(shard.shape)))
    return items


def test_training_state_comes_back_by_kind_and_replicated_tensors_are_stored_once(llama: Path, tmp_path: Path) -> None:
    config, directory = read_hf_config(llama), tmp_path / "step_00000003"
    begin(directory)
    items = [training_state(config, rank, seed=5) for rank in range(2)]
    manifests = [write_shard_file(directory, f"pp00-tp{rank:02d}", items[rank], 40_000) for rank in range(2)]
    assert not directory.exists()
    commit(directory, json.loads(json.dumps(manifests)), {"step": 3, "rng": [1, 2]}, llama)
    assert len(list(directory.glob("pp00-tp00-*.safetensors"))) > 2, "files are bounded"
    checkpoint = open_checkpoint(directory)
    assert checkpoint.state == {"step": 3, "rng": [1, 2]} and checkpoint.kinds == ("weights", "exp_avg")
    assert len(checkpoint.tensors["weights"]["model.norm.weight"]["pieces"]) == 1
    for rank in range(2):
        for kind, shard, tensor in items[rank]:
            read = torch.empty(shard.shape)
            fill_shard(shard, checkpoint.source(kind), read)
            rows = sum(piece.length for piece in shard.pieces)
            if rows < shard.shape[0] and shard.partition_dim == 0:  # padded vocabulary
                tensor = tensor.clone()
                tensor[rows:] = 0
            assert torch.equal(read, tensor), (kind, shard.name)


def test_checkpoints_are_found_by_step_and_half_written_ones_are_not(llama: Path, tmp_path: Path) -> None:
    assert step_checkpoints(tmp_path / "none") == []
    for name in ("step_00000002", "step_100000000", "step_00000010"):
        import_hf(llama, tmp_path / name)
    (tmp_path / "step_999999999").mkdir()
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_999999998.tmp")
    found = [path.name for path in step_checkpoints(tmp_path)]
    assert found == ["step_00000002", "step_00000010", "step_100000000"]


def test_writing_a_step_again_replaces_it(llama: Path, tmp_path: Path) -> None:
    directory, config = tmp_path / "step_00000001", read_hf_config(llama)
    for seed in (1, 50):
        begin(directory)
        manifests = [write_shard_file(directory, f"tp{rank}", training_state(config, rank, seed)) for rank in range(2)]
        commit(directory, manifests, {"seed": seed}, llama)
    assert open_checkpoint(directory).state == {"seed": 50}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_commit_without_a_ranks_pieces_is_an_error_and_leaves_no_checkpoint(llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "step_00000001"
    begin(directory)
    manifest = write_shard_file(directory, "tp0", training_state(read_hf_config(llama), 0, 0))
    with pytest.raises(ValueError, match="do not make up weights"):
        commit(directory, [manifest], {}, llama)
    assert not directory.exists()


def test_a_checkpoint_holds_no_pickle(llama: Path, tmp_path: Path) -> None:
    import_hf(llama, tmp_path / "checkpoint")
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_tokenizer_templates_and_generation_config_travel_through_the_checkpoint(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (model / "pytorch_model.bin").write_bytes(b"not to be copied")
    import_hf(model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "hf"))
    assert after.encode("a b") == before.encode("a b")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "hf" / "pytorch_model.bin").exists()


def test_types_that_differ_inside_a_fused_projection_lose_nothing(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if "q_proj" in name or "gate_proj" in name:
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, str(model / "model.safetensors"))
    import_hf(model, tmp_path / "checkpoint", 2)
    found = tensors_of(tmp_path / "checkpoint")
    assert all(torch.equal(found[name].double(), tensors[name].double()) for name in tensors)


def test_an_empty_output_directory_named_relatively_is_taken(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "sub")
    with pytest.raises(UserError, match="choose another"):
        import_hf(llama, "..")
    import_hf(llama, "../sub")
    assert (tmp_path / "out" / "sub" / "checkpoint.json").is_file()


def test_training_in_another_type_is_exported_in_the_states_type(llama: Path, tmp_path: Path) -> None:
    directory, config = tmp_path / "step_00000001", read_hf_config(llama)
    begin(directory)
    manifests = [write_shard_file(directory, f"tp{rank}", training_state(config, rank, 0)) for rank in range(2)]
    commit(directory, manifests, {"dtype": "bfloat16"}, llama)
    export_checkpoint(directory, tmp_path / "hf")
    masters, exported = tensors_of(directory), tensors_of(tmp_path / "hf")
    assert all(torch.equal(exported[name], masters[name].bfloat16()) for name in masters)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype is torch.bfloat16


def test_files_of_an_export_belong_to_one_stage_and_writers_work_alone(llama: Path, tmp_path: Path) -> None:
    config, source = read_hf_config(llama), open_hf(llama)
    plan = plan_export(config, torch.float32, stages=[range(2), range(2, 4)], max_shard_bytes=150_000)
    stages: list[list[str]] = [[], []]
    for name in logical_shapes(shape_of(config)):
        first = "embed" in name or name.startswith(("model.layers.0.", "model.layers.1."))
        stages[0 if first else 1].append(name)
    begin(tmp_path / "hf")
    written = [
        write_export_files(plan, tmp_path / "hf", [(name, source.read(name, 0, 0, plan.shapes[name][0])) for name in part])
        for part in stages
    ]
    assert sorted([*written[0], *written[1]]) == sorted(plan.files) and len(plan.files) > 2
    finish_export(plan, tmp_path / "hf", llama)
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(llama))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same(dict(model.named_parameters()), tensors_of(llama))


def test_an_export_that_misses_a_tensor_is_an_error(llama: Path, tmp_path: Path) -> None:
    plan = plan_export(read_hf_config(llama), torch.float32)
    begin(tmp_path / "hf")
    with pytest.raises(ValueError, match="is incomplete"):
        write_export_files(plan, tmp_path / "hf", [("model.norm.weight", torch.ones(64))])


def test_an_output_directory_with_something_in_it_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="choose another"):
        import_hf(llama, tmp_path / "out")
    import_hf(llama, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="choose another"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parallel.tensor 3"):
        import_hf(llama, tmp_path / "out", num_tensor=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_a_released_source_holds_no_file_and_reads_again(tmp_path):
    source, name = open_hf(save_model(tmp_path, tokenizer=False)), "model.norm.weight"

    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    first = source.read(name, 0, 0, 4).clone()
    assert is_mapped()
    source.release()
    assert not is_mapped()
    assert torch.equal(source.read(name, 0, 0, 4), first)
