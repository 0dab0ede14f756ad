"""The quickstart's tokenizer and model, in plain transformers: make, warm up on the right answers, generate."""

from __future__ import annotations

import random

import torch
from task import LETTERS, Row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]


def make_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding whose pieces are single characters: a reversed word then has the same tokens backwards."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    texts = [row["prompt"] + row["chosen"] for row in rows] + [LETTERS]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, show_progress=False))
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of random weights. Heads, groups and layers can be halved: it trains on two processes in any layout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """The most likely answer to each prompt, token by token (greedy)."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        tokens_BT = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(tokens_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """Share of the rows whose prompt the model answers with the chosen answer, letter for letter."""
    given = answers(model, tokenizer, [row["prompt"] for row in rows])
    return sum(answer == row["chosen"] for answer, row in zip(given, rows, strict=True)) / len(rows)


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    *,
    max_steps: int,
    until_right: float,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> float:
    """Supervised fine-tuning on the chosen answers until `until_right` of some training prompts are answered rightly.

    Stopped early on purpose: a model that is right every time has nothing left to learn from preferences.

    Returns:
        The share of right answers on the prompts it was watched on.
    """
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    watched, right = rows[:128], 0.0
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 50)
        batch = generator.sample(rows, min(batch_size, len(rows)))
        loss = model(**sft_batch(tokenizer, batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == max_steps:
            right = share_right(model, tokenizer, watched)
            print(f"  warm-up step {step}: loss {loss.item():.3f}, right answers {right:.0%}", flush=True)
            if right >= until_right:
                break
    return right


def sft_batch(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Prompt, chosen answer and end-of-sequence, padded on the right; labels on the answer only."""
    sequences, labels = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        sequences.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids_BT = pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask_BT = pad([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    return {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": pad(labels, True, -100)}
