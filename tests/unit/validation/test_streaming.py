"""What a stream cannot do is refused when options are read, in a sentence with what to set."""

from __future__ import annotations

import pytest

from megadpo.errors import UserError
from megadpo.validation.load import load_config

STREAMED = ("data.streaming=true", "train.steps=8")


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config({}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stream_needs_steps() -> None:
    assert refused("data.streaming=true").endswith("is not known before its end; set train.steps")
    words = refused("data.streaming=true", "train.epochs=2")
    assert words.startswith("train.epochs is 2, but data.streaming is true") and words.endswith(
        "set train.steps in its place"
    )
    config = load_config({}, STREAMED)
    assert (config.data.streaming, config.data.streaming_buffer, config.resolved().train.epochs) == (True, 10_000, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.streaming_buffer=100",), "data.streaming_buffer has no effect without data.streaming"),
        (
            (*STREAMED, "data.shuffle=false", "data.streaming_buffer=100"),
            "data.streaming_buffer has no effect with",
        ),
        ((*STREAMED, "data.streaming_buffer=0"), "data.streaming_buffer must be at least 1, got 0"),
        ((*STREAMED, "data.step_tokens_multiple_of=512"), "data.step_tokens_multiple_of exchanges pairs between steps"),
        ((*STREAMED, "reference.mode=precomputed"), "data.streaming is true, but log-probs are computed once for rows"),
        ((*STREAMED, "reference.mode=cached"), "data.streaming is true, but log-probs are computed once for rows"),
        (
            (*STREAMED, "objective.loss_type=kto", "data.max_length=null"),
            "data.max_length is null, but kto with data.streaming puts a prompt before any row's answer",
        ),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(overrides: tuple[str, ...], words: str) -> None:
    assert refused(*overrides).startswith(words)


def test_kto_streams_where_every_prompt_fits_every_answer() -> None:
    assert load_config({}, [*STREAMED, "objective.loss_type=kto"]).data.streaming


def test_fp16_is_refused_with_bf16_named() -> None:
    for name in ("fp16", "float16", "half", "torch.float16"):
        assert (
            refused(f"model.dtype={name}") == f"model.dtype: {name!r} is not available in this version of megadpo; use bf16"
        )
