"""Small random models and tokenizers as Hugging Face directories, and real preference rows."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megadpo.data.groups import Group
from megadpo.data.rows.formats import PAIRS, Reading

DATA = Path(os.environ.get("MEGADPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
VOCAB_SIZE = 499  # odd: no tensor-parallel size divides it

PREFIXES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "ministral": "Ministral",
    "glm": "Glm",
    "glm4": "Glm4",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "gpt_oss": "GptOss",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "qwen2_moe": "Qwen2Moe",
    "glm4_moe": "Glm4Moe",
    "llama4_text": "Llama4Text",
    "qwen3_next": "Qwen3Next",
}
"""What transformers' classes of each family begin with."""

AFTER_DENSE_LAYERS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK: dict[str, Any] = {
    **AFTER_DENSE_LAYERS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 48},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.5,
    },
    "ministral": {"head_dim": 24, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm": {"head_dim": 24},
    "glm4": {"head_dim": 24},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24, "attn_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24, "sliding_window_pattern": 2},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "swiglu_limit": 0.7},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "glm4_moe": {"head_dim": 24, **AFTER_DENSE_LAYERS},
    "llama4_text": {
        "head_dim": 24,
        "intermediate_size": 48,
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": [0, 1, 3],
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 24,
        "floor_scale": 16,
    },
    "qwen3_next": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "cohere2": {"logit_scale": 0.25, "sliding_window": 24, "sliding_window_pattern": 2},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 32},
}
"""What a small model of a family has beside the sizes of all."""


def hh_rows(count: int) -> list[dict[str, str]]:
    """Raw hh-rlhf rows, chosen and rejected dialogues; made-up ones where the data directory is missing."""
    path = DATA / "hh-rlhf-harmless-test.jsonl.gz"
    if path.exists():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    warnings.warn(f"{path} is missing: using made-up dialogues instead of hh-rlhf rows", stacklevel=2)
    words = [
        "the",
        "a",
        "model",
        "answer",
        "question",
        "yes",
        "no",
        "why",
        "because",
        "maybe",
        "please",
        "thanks",
        "do",
        "not",
        "know",
        "think",
    ]
    random = np.random.default_rng(0)

    def say(n: int) -> str:
        return " ".join(random.choice(words, n))

    rows = []
    for _ in range(count):
        prompt = f"\n\nHuman: {say(random.integers(5, 60))}\n\nAssistant:"
        rows.append({key: f"{prompt} {say(random.integers(3, 40))}" for key in ("chosen", "rejected")})
    return rows


def write_hh(path: Path, count: int) -> Path:
    """hh-rlhf rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in hh_rows(count)), encoding="utf-8")
    return path


def save_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> Any:
    """A byte-level BPE tokenizer trained on the rows, with <s> put first as Llama's do, and </s> as end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((row["chosen"] for row in hh_rows(300)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(directory)
    return fast


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """The transformers config of a small model of `family`."""
    import transformers

    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **OWN_SIZES.get(family, {}),
        **changes,
    }
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    return getattr(transformers, f"{PREFIXES[family]}Config")(**settings)


def save_model(directory: Path, family: str = "llama", seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    """A random model of `family` with weights large enough that attention matters, as a Hugging Face directory."""
    import transformers

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    model.to(changes.get("dtype", torch.float32)).save_pretrained(directory)
    if tokenizer:
        save_tokenizer(directory)
    return directory


def random_groups(
    count: int,
    seed: int = 0,
    longest: int = 40,
    vocab_size: int = VOCAB_SIZE,
    kind: str = "pairs",
    numbered: bool = False,
) -> list[Group]:
    """Groups of random tokens and lengths: pairs, lists of 2 to 4, labelled answers (some with two), or examples.

    Every fifth has a prompt for each response. Pairs have weights, margins, label probabilities and scores only where they
    are `numbered`.
    """
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(0, vocab_size, random.integers(low, high)).astype(np.int32)

    groups = []
    for row in range(count):
        size = {"pairs": 2, "lists": 2 + row % 3, "labels": 1 + row % 3 // 2, "examples": 1}[kind]
        prompts = tuple(ids(1, longest) for _ in range(size if row % 5 == 4 else 1))
        responses = tuple(ids(1, longest // 2) for _ in range(size))
        row_values: dict[str, tuple[float, ...]] = {}
        if kind == "labels":
            row_values["label"] = (float(row % 2),) if size == 1 else (1.0, 0.0)
        if kind == "lists" or numbered:
            row_values["score"] = tuple(1.5 * (size - place) + row % 2 for place in range(size))
        if numbered:
            row_values["weight"] = (0.5 + row % 4 / 4,) * size
            row_values["margin"] = (row % 3 / 2,) * size
            row_values["label_probability"] = (1 - row % 4 / 10,) * size
        groups.append(Group(prompts, responses, row, row_values))
    return groups


def hh_groups(count: int, tokenizer: Path, max_length: int | None = None) -> list[Group]:
    """The first `count` usable real pairs."""
    with tempfile.TemporaryDirectory() as directory:
        rows = write_hh(Path(directory) / "rows.jsonl", count + 50)
        return groups_of_file(rows, tokenizer, max_length)[:count]


def groups_of_file(path: Path, tokenizer: Path, max_length: int | None = None, reading: Reading = PAIRS) -> list[Group]:
    """A file's rows, tokenised by our own data path, in memory."""
    from megadpo.config.schema import DataConfig
    from megadpo.data.rows.dataset import prepare_groups

    with tempfile.TemporaryDirectory() as directory:
        options = DataConfig(max_length=max_length, cache_dir=directory, num_workers=1)
        store = prepare_groups(options, str(path), str(tokenizer), reading).groups
        return [
            replace(g, prompts=tuple(map(np.array, g.prompts)), responses=tuple(map(np.array, g.responses))) for g in store
        ]


def save_reward_model(directory: Path, family: str = "llama", tokenizer: bool = True, **changes: Any) -> Path:
    """A random ...ForSequenceClassification with one label, as transformers saves it; its padding token is `</s>`."""
    import transformers

    language_model = save_model(directory / "language-model", family, tokenizer=False, **changes)
    config = transformers.AutoConfig.from_pretrained(language_model, num_labels=1)
    config.pad_token_id = changes.get("pad_token_id", config.eos_token_id)
    torch.manual_seed(1)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        language_model, config=config, output_loading_info=True
    )
    assert list(report["missing_keys"]) == ["score.weight"]
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(directory)
    if tokenizer:
        save_tokenizer(directory)
    return directory
