"""A row in its common form: a prompt with its completions, and why it may be useless for training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megadpo.data.rows.messages import Content, is_empty

EMPTY = "empty completion"
IDENTICAL = "identical chosen and rejected"
IDENTICAL_LIST = "identical responses"
EQUAL_SCORES = "all scores equal"
NO_PREFERENCE = "neither answer preferred"


@dataclass(frozen=True)
class Row:
    """A row in its common form: a prompt with K >= 1 completions, whatever the format it came in.

    Attributes:
        prompts: one for all completions, or one each where they differ; text, or messages where `conversational`.
        completions: K of the prompts' form; of a pair the chosen one first, of a list the best first.
        conversational: True for lists of {"role", "content"} messages.
        template_kwargs: further arguments of the chat template (`tools` and more).
        row_values: name -> K floats: the values of `Reading.row_values`, and "label" or "score" where the kind has it.
        ranked: whether the completions are in the order of their scores, so that these must differ.
        has_no_preference: whether the row says that no completion is better than the others.
        implicit_prompt: whether the prompt is the common beginning of two texts.
        unread: columns with text that nothing has read.
        plain: the same as text, for tokenizers without a chat template; only of a question and its answers from columns
            under other names than ours, which do not say whether they are conversations.
    """

    prompts: tuple[Content, ...]
    completions: tuple[Content, ...]
    conversational: bool
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    row_values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ranked: bool = False
    has_no_preference: bool = False
    implicit_prompt: bool = field(default=False, compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    plain: Row | None = field(default=None, compare=False)

    def reason_to_drop(self) -> str | None:
        """The reason why the row is useless for training, or None."""
        first, *others = self.completions
        if any(is_empty(completion) for completion in self.completions):
            return EMPTY
        if others and len(self.prompts) == 1 and all(other == first for other in others):
            return IDENTICAL if len(others) == 1 else IDENTICAL_LIST
        if self.has_no_preference:
            return NO_PREFERENCE
        if self.ranked and len(set(self.row_values["score"])) == 1:
            return EQUAL_SCORES
        return None

    @property
    def has_empty_prompt(self) -> bool:
        """Whether an answer stands without a prompt, or with one that says nothing."""
        return any(is_empty(prompt) for prompt in self.prompts)
