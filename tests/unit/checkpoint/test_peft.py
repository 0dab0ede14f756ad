"""PEFT directories: what PEFT saved comes back bit for bit, what we write PEFT loads, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.companions import companions_of
from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.merged import MergedSource
from megadpo.checkpoint.peft import base_of, open_adapter, why_peft_cannot, write_peft
from megadpo.checkpoint.sharded import open_checkpoint
from megadpo.checkpoint.staging import begin
from megadpo.cli import main
from megadpo.config.schema import AdapterConfig, Config
from megadpo.errors import UserError
from megadpo.model.adapters.spec import adapter_shapes, resolve
from megadpo.model.families import shape_of
from megadpo.training.models import open_model
from tests.helpers import peft_oracle
from tests.helpers.families import config_of
from tests.helpers.models import save_model

PATTERNS = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"target_modules": "all-linear"}),
    "dora": ("qwen2", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "patterns": (
        "qwen3",
        {},
        {"target_modules": r".*\.(q|up)_proj", "use_rslora": True, "modules_to_save": ["lm_head", "norm"], **PATTERNS},
    ),
    "tied": (
        "mistral",
        {"tie_word_embeddings": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "mixtral": ("mixtral", {}, {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}),
    "vocabulary": ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"lm_head": 3}}),
    "tied head": ("qwen2", {"tie_word_embeddings": True}, {"target_modules": ["lm_head", "v_proj"]}),
    "tied embedding and head": ("qwen3", {"tie_word_embeddings": True}, {"target_modules": ["lm_head", "embed_tokens"]}),
}
TOKENS = torch.arange(30)[None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each adapter as PEFT saves it, with its base and what they say."""
    root = tmp_path_factory.mktemp("adapters")
    for name, (family, model, options) in ADAPTERS.items():
        save_model(root / name / "base", family, tokenizer=False, num_hidden_layers=2, **model)
        adapted = peft_oracle.adapted_model(root / name / "base", r=4, lora_alpha=8, **options).eval()
        adapted.save_pretrained(root / name / "peft", save_embedding_layers=False)
        with torch.no_grad():
            torch.save(adapted(TOKENS).logits, root / name / "logits.pt")
    return root


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_round_trip_through_shards_gives_the_same_bits_and_peft_the_same_logits(
    name: str, root: Path, tmp_path: Path
) -> None:
    import peft

    before = load_file(root / name / "peft" / "adapter_model.safetensors")
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        checkpoint, out = tmp_path / f"{tensor}-{pipeline}", tmp_path / f"hf-{tensor}-{pipeline}"
        import_hf(root / name / "peft", checkpoint, tensor, pipeline)
        export_checkpoint(checkpoint, out)
        after = load_file(out / "adapter_model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
    expected = torch.load(root / name / "logits.pt", weights_only=True)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(load(root / name / "base"), out)), expected)
    merge_adapter(checkpoint, tmp_path / "merged")
    assert torch.allclose(logits_of(load(tmp_path / "merged")), expected, atol=1e-5)
    assert logits_of(load(root / name / "base")).sub(expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "dora"])
def test_a_slice_of_a_merged_tensor_is_that_slice_of_peft_s(name: str, root: Path) -> None:
    import peft

    base = root / name / "base"
    merged = peft.PeftModel.from_pretrained(load(base), root / name / "peft").merge_and_unload().state_dict()
    shape = shape_of(read_hf_config(base))
    adapter = open_adapter(root / name / "peft", shape, "adapter.path")
    source = MergedSource(open_hf(base), adapter.source, adapter.spec)
    for tensor in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        for dim in range(merged[tensor].ndim):
            ours = source.read(tensor, dim, 8, 16)
            assert torch.allclose(ours, merged[tensor].narrow(dim, 8, 16), rtol=1e-6, atol=1e-7)
        assert torch.equal(source.read(tensor, 0, 0, 64), source.read(tensor, 0, 0, 64)), "reading changes nothing"


def test_a_merge_of_a_bf16_base_is_rounded_once(root: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", tokenizer=False, num_hidden_layers=2, dtype=torch.bfloat16)
    peft_directory = changed(root / "llama" / "peft", tmp_path / "peft", base_model_name_or_path=str(base))
    for out, dtype in (("bf16", None), ("fp32", torch.float32)):
        merge_adapter(peft_directory, tmp_path / out, dtype=dtype)
    rounded, exact = (load_file(tmp_path / out / "model.safetensors") for out in ("bf16", "fp32"))
    assert all(rounded[name].dtype is torch.bfloat16 for name in rounded)
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_adapters_of_mixtures_load_in_peft(family: str, tmp_path: Path) -> None:
    """transformers 5 has experts' matrices in one tensor; PEFT turns adapters of the names that vLLM reads into its own.
    Llama 4's experts, which its files have so, take none; its dense layers' and shared experts' matrices do."""
    import peft

    base = save_model(tmp_path / "base", family, tokenizer=False, num_hidden_layers=3 if family == "llama4_text" else 2)
    shape = shape_of(read_hf_config(base))
    spec = resolve(AdapterConfig(kind="lora", rank=4, alpha=8), shape)
    torch.manual_seed(0)
    tensors = {name: 0.1 * torch.randn(size) for name, size in adapter_shapes(shape, spec).items()}
    begin(tmp_path / "peft")
    write_peft(tmp_path / "peft", spec, shape, tensors, str(base), companions_of(base))
    merge_adapter(tmp_path / "peft", tmp_path / "merged")
    theirs = logits_of(peft.PeftModel.from_pretrained(load(base), tmp_path / "peft"))
    assert torch.allclose(logits_of(load(tmp_path / "merged")), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "model", "options", "sentence"),
    [
        ("llama", {}, {"use_dora": True}, None),
        ("mixtral", {}, {}, None),
        ("mixtral", {}, {"use_rslora": True}, "plain LoRA of one rank and alpha only"),
        ("mixtral", {}, {"target_modules": ["w1", "w2"]}, "adapters of w1 and w3 together only"),
        ("qwen3_moe", {"mlp_only_layers": []}, {}, None),
        (
            "qwen3_moe",
            {},
            {},
            "leaves out adapters of dense layers' matrices of the same names (model.layers.1.mlp.gate_proj)",
        ),
        ("glm4_moe", {}, {"target_modules": ["q_proj", "o_proj"]}, None),
        ("llama4_text", {}, {}, None),
        (
            "glm4_moe",
            {"first_k_dense_replace": 0},
            {"target_modules": ["q_proj", "shared_experts.up_proj"]},
            "dense matrices of the experts' names (model.layers.0.mlp.shared_experts.up_proj) for experts",
        ),
    ],
)
def test_what_peft_cannot_load_is_known(family: str, model: Any, options: Any, sentence: str | None) -> None:
    shape = shape_of(config_of(family, **model))
    problem = why_peft_cannot(resolve(AdapterConfig(kind="lora", **options), shape), shape)
    assert problem is None if sentence is None else problem is not None and sentence in problem


def test_an_imported_adapter_says_which_model_it_belongs_to(root: Path, tmp_path: Path) -> None:
    import_hf(root / "llama" / "peft", tmp_path / "checkpoint")
    assert open_checkpoint(tmp_path / "checkpoint").state["adapter"]["base_model_name_or_path"] == str(
        root / "llama" / "base"
    )
    assert base_of(tmp_path / "checkpoint") == str(root / "llama" / "base")


def test_the_file_s_head_has_the_digest_of_the_base(root: Path, tmp_path: Path) -> None:
    import_hf(root / "llama" / "peft", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    with safe_open(str(tmp_path / "hf" / "adapter_model.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}, "PEFT's own directory says nothing of it"


def changed(directory: Path, out: Path, **settings: Any) -> Path:
    """A copy with other values in adapter_config.json."""
    shutil.copytree(directory, out)
    file = out / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return out


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, str(file))

    return apply


def without(*names: str) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: [tensors.pop(name) for name in names].clear())


def rename_to_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def cut_off(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"rank_pattern": {"q_proj": 4.7}}, "rank_pattern is {'q_proj': 4.7}; it must be names with whole numbers above 0"),
    ({"exclude_modules": "("}, "exclude_modules is no regular expression"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA adapters are supported"),
    ({"bias": "all"}, "bias is 'all'; adapters with trained biases are not supported"),
    ({"r": 0}, "r is 0; it must be a whole number of 1 or more"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
    ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
    ({"r": 8}, "tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape [4, 64], but"),
    ({"use_dora": True}, f"has no tensor {Q}.lora_magnitude_vector"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base's weights"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is [1], which is not supported; only plain LoRA is"),
    ({"target_parameters": ["gate_up_proj"]}, 'target_parameters is ["gate_up_proj"], which is not supported'),
    ({"target_modules": ["q_proj"]}, "has an adapter of model.layers.0.self_attn.k_proj, of which adapter_config.json says"),
    ({"target_modules": "(("}, "target_modules is no regular expression"),
    ({"target_modules": None}, "target_modules is None, which is not supported"),
    ({"layers_to_transform": "1"}, "layers_to_transform is '1'; it must be a list of layers' numbers"),
    ({"modules_to_save": ["lm_head"]}, "its tensors do not have lm_head, of which modules_to_save says otherwise"),
    ({"rank_pattern": {"((": 2}}, "rank_pattern has '((', which is no regular expression"),
    ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern has the expression '(a+)+b', which could take too long to match"),
    ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "alpha_pattern has the expression '.*.*.*.*.*x', which could take too long"),
    ({"target_modules": "(.*a|.*b)*"}, "target_modules has the expression '(.*a|.*b)*', which could take too long to"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is {'q_proj': 0}; it must be names with whole numbers above 0"),
]
FILES: list[tuple[Callable[[Path], None], str]] = [
    (rename_to_pickle, "has its adapter as a pickle (adapter_model.bin) only, which megadpo does not open; load it with"),
    (cut_off, "is truncated or no safetensors file"),
    (without(f"{Q}.lora_B.weight"), f"has no tensor {Q}.lora_B.weight"),
    (
        without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        "says that model.layers.0.self_attn.q_proj has an adapter, but adapter_model.safetensors has no tensors of it",
    ),
    (
        with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64)})),
        "tensor model.norm.weight has no name of PEFT's",
    ),
    (
        with_tensors(
            lambda t: t.update({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)})
        ),
        "has an adapter of model.layers.7.self_attn.q_proj, which is no module of the model that can",
    ),
    (
        with_tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(2, 2)})),
        "save it with save_embedding_layers=False",
    ),
    (
        with_tensors(lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 4, dtype=torch.int8)})),
        "is torch.int8, which is not supported",
    ),
]


@pytest.mark.parametrize(
    ("settings", "sentence"), SETTINGS, ids=[next(iter(case[0])) + str(i) for i, case in enumerate(SETTINGS)]
)
def test_settings_that_mean_something_else_are_refused(
    settings: dict[str, Any], sentence: str, root: Path, tmp_path: Path
) -> None:
    directory = changed(root / "llama" / "peft", tmp_path / "peft", **settings)
    assert sentence in error_of(root, directory)


@pytest.mark.parametrize(("change", "sentence"), FILES)
def test_damaged_files_are_refused(change: Callable[[Path], None], sentence: str, root: Path, tmp_path: Path) -> None:
    directory = changed(root / "llama" / "peft", tmp_path / "peft")
    change(directory)
    assert sentence in error_of(root, directory)


def error_of(root: Path, directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_adapter(directory, shape_of(read_hf_config(root / "llama" / "base")), "adapter.path")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"base_model_name_or_path": "meta-llama/Llama-3.1-8B"},
            "names the base model meta-llama/Llama-3.1-8B, which is no dir",
        ),
        ({"base_model_name_or_path": None}, "names no base model (base_model_name_or_path); set model.path"),
    ],
)
def test_a_base_that_is_not_here_is_named(settings: dict[str, Any], sentence: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        merge_adapter(changed(root / "llama" / "peft", tmp_path / "peft", **settings), tmp_path / "out")
    assert sentence in str(caught.value)


def test_an_adapter_is_nobody_s_base(root: Path, tmp_path: Path) -> None:
    itself = str(tmp_path / "peft")
    adapter = changed(root / "llama" / "peft", tmp_path / "peft", base_model_name_or_path=itself)
    with pytest.raises(UserError, match=r"names the base model .*, which is an adapter itself; merge that one first"):
        base_of(adapter)


@pytest.mark.parametrize("name", ["tied head", "tied embedding and head"])
def test_an_adapter_that_makes_two_matrices_of_one_is_merged_to_a_model_with_a_head_of_its_own(
    name: str, root: Path, tmp_path: Path
) -> None:
    merge_adapter(root / name / "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(root / name / "base" / "model.safetensors")
    is_embedding_as_it_was = torch.equal(tensors["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert is_embedding_as_it_was == (name == "tied head")
    read, written = (open_model(str(path), "model.path", Config()) for path in (root / name / "peft", tmp_path / "out"))
    assert read.shape == written.shape and not read.shape.tied_embeddings
    assert torch.equal(*(model.source.read("lm_head.weight", 0, 5, 9) for model in (read, written)))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_the_base_that_peft_writes_beside_adapters_of_its_ends_have_to_be_the_base_s(
    tied: bool, root: Path, tmp_path: Path
) -> None:
    name = "tied head" if tied else "vocabulary"
    adapted = peft_oracle.adapted_model(root / name / "base", r=4, lora_alpha=8, **ADAPTERS[name][2])
    adapted.save_pretrained(tmp_path / "peft")
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for directory, out in ((tmp_path / "peft", tmp_path / "a"), (root / name / "peft", tmp_path / "b")):
        merge_adapter(directory, out)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with_tensors(lambda tensors: tensors[copy].add_(1.0))(tmp_path / "peft")
    with pytest.raises(UserError, match=r"has weights of its base itself \(base_model.model.lm_head.base_layer.weight\)"):
        import_hf(tmp_path / "peft", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"are not those of .*; give the base that it was trained on"):
        merge_adapter(tmp_path / "peft", tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("vocabulary", {"use_dora": True}, "it has a DoRA adapter of the embedding, which is not supported"),
        ("tied head", {"ensure_weight_tying": True}, "ensure_weight_tying is true, so that embedding and head share an"),
    ],
)
def test_what_is_not_plain_lora_of_embedding_and_head_is_refused(
    name: str, settings: dict[str, Any], sentence: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        import_hf(changed(root / name / "peft", tmp_path / "peft", **settings), tmp_path / "out")


def test_the_command_merges_with_a_base_that_has_moved(root: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(root / "llama" / "base", tmp_path / "moved"))
    adapter = changed(root / "llama" / "peft", tmp_path / "peft", base_model_name_or_path="somewhere/else")
    status = main(["convert", "merge", str(adapter), str(tmp_path / "out"), "--base", str(moved), "--dtype", "bf16"])
    assert status == 0 and json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merge_adapter(root / "llama" / "peft", tmp_path / "exact")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert all(torch.equal(t, exact[n].bfloat16()) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


def test_a_model_is_no_adapter_to_merge(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no adapter: neither a PEFT directory nor a checkpoint of a run with adapters"):
        merge_adapter(root / "llama" / "base", tmp_path / "out")


def test_a_base_of_other_weights_is_refused_where_the_adapter_s_own_is_here(root: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "llama", tokenizer=False, num_hidden_layers=2, seed=5)
    with pytest.raises(UserError, match=r"whose files are not those of .*; use the model that it was trained on"):
        merge_adapter(root / "llama" / "peft", tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(root: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(root / "llama" / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UserError, match=r"base is quantised .*; name the model that it was made from, in bf16 or fp32"):
        merge_adapter(root / "llama" / "peft", tmp_path / "out", base=base)
