"""A group: one prompt with its K responses, as token ids. The unit of everything downstream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Group:
    """One prompt with K >= 1 responses (K = 2: a preference pair, chosen first).

    Attributes:
        prompts: one int32 array shared by every response, or K arrays where the prompts differ.
        responses: K non-empty int32 arrays (the completions, end-of-sequence token included).
        row: the row's position in the sources, counted from 0 over all of them before anything is dropped.
        row_values: K floats by name, one for each response: "score", "label", "weight", "margin", "label_probability"; a
            value of the whole row is repeated for each of its responses.
    """

    prompts: tuple[TokenIds, ...]
    responses: tuple[TokenIds, ...]
    row: int
    row_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.responses and all(len(response) for response in self.responses)
        assert len(self.prompts) in (1, len(self.responses))
        assert all(len(values) == len(self.responses) for values in self.row_values.values())

    def prompt_of(self, response: int) -> TokenIds:
        """The prompt that response number `response` continues."""
        return self.prompts[response if len(self.prompts) > 1 else 0]

    @property
    def shares_prompt(self) -> bool:
        """Whether all responses have the same prompt."""
        return len(self.prompts) == 1

    def num_stream_tokens(self, share_prompts: bool) -> int:
        """Tokens of this group in a micro-batch's stream, with or without a shared prompt."""
        num_response_tokens = sum(len(response) for response in self.responses)
        if share_prompts and self.shares_prompt:
            return len(self.prompts[0]) + num_response_tokens
        return num_response_tokens + sum(len(self.prompt_of(i)) for i in range(len(self.responses)))
