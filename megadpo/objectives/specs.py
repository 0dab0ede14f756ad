"""What each loss is and what it combines with: plain data, read by the option check and the documentation without torch.

The training loop reads an `Objective` (objective.py), which is made of this once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megadpo.data.rows.formats import Reading

if TYPE_CHECKING:
    from megadpo.config.schema import ObjectiveConfig


@dataclass(frozen=True)
class Spec:
    """An objective's declaration.

    Attributes:
        paper: where it comes from.
        file: the file of this folder that has its function, whose name is the loss's.
        needs_reference: whether it reads the reference's log-probs.
        divergences: whether f-divergences other than reverse_kl are defined for it.
        weighting: whether WPO weights are defined for it.
        options: options of `objective` beyond beta that it reads; any other set to something else than its default
            is refused.
        scores_prompt: whether the log-probs of the prompt's own tokens are needed.
        couples_batch: whether a unit's loss depends on others of the global batch: then a forward-only pass collects all
            statistics first.
        reads: the kind of rows, see `Reading` of data/rows/formats.py; "any" goes with losses of any kind.
        reads_scores: whether it reads the pairs' given scores.
        measures_kl: whether it is measured against the KL of mismatched answers (KTO).
        runs_delta: whether it always shifts rewards by their running mean (BCO).
        reward_head: whether it trains a scalar head.
        reward: what `rewards/*` show where no loss reads a reference: beta times the "log_prob" or "mean_log_prob" of a
            response, or what the "head" gives; with a reference it is beta times the "log_ratio".
    """

    paper: str
    file: str = "pairwise"
    needs_reference: bool = True
    divergences: bool = False
    weighting: bool = True
    options: frozenset[str] = field(default_factory=frozenset)
    scores_prompt: bool = False
    couples_batch: bool = False
    reads: str = "pairs"
    reads_scores: bool = False
    measures_kl: bool = False
    runs_delta: bool = False
    reward_head: bool = False
    reward: str = "log_ratio"

    @property
    def lengths_weighted(self) -> bool:
        """Whether LD-DPO's token weights are defined for it: they compare the two answers of a pair."""
        return self.needs_reference and self.reads == "pairs"

    @property
    def row_weighting(self) -> bool:
        """Whether its losses belong to single rows: where they are sorted over the batch they belong to none."""
        return not self.couples_batch

    @property
    def nll_term(self) -> bool:
        """Whether the NLL term can be added: not to itself, and not where there are no log-probs."""
        return not self.reward_head and self.reads != "any"


def _spec(paper: str, *options: str, **changes: Any) -> Spec:
    return Spec(paper, options=frozenset(options), **changes)


LOGIT_TERMS = ("length_penalty", "dpop_lambda", "margins")
"""Options that change the scaled margin of a pair before the loss sees it."""

LABEL_WEIGHTS = ("desirable_weight", "undesirable_weight")

SPECS: dict[str, Spec] = {
    "sigmoid": _spec("DPO, arXiv:2305.18290; cDPO", "label_smoothing", "soft_labels", *LOGIT_TERMS, divergences=True),
    "sigmoid_norm": _spec("length-normalised DPO (Tulu 3, arXiv:2411.15124)", divergences=True),
    "hinge": _spec("SLiC-HF, arXiv:2305.10425", *LOGIT_TERMS, divergences=True),
    "ipo": _spec("IPO, arXiv:2310.12036", "ipo_normalization", divergences=True),
    "exo_pair": _spec("EXO, arXiv:2402.00856, eq. 16", "label_smoothing", *LOGIT_TERMS, divergences=True),
    "robust": _spec("robust DPO, arXiv:2403.00409", "label_smoothing", *LOGIT_TERMS, divergences=True),
    "nca_pair": _spec("NCA, arXiv:2402.05369"),
    "bco_pair": _spec("BCO, arXiv:2404.04656", "bco_running_delta"),
    "sppo_hard": _spec("SPPO, arXiv:2405.00675"),
    "aot": _spec("AOT, arXiv:2406.05882", "label_smoothing", file="coupled", weighting=False, couples_batch=True),
    "aot_unpaired": _spec("AOT, arXiv:2406.05882", "label_smoothing", file="coupled", weighting=False, couples_batch=True),
    "apo_zero": _spec("APO, arXiv:2408.06266, eq. 7"),
    "apo_down": _spec("APO, arXiv:2408.06266, eq. 8"),
    "discopop": _spec("DiscoPOP, arXiv:2406.08414, eq. 5", "discopop_tau", *LOGIT_TERMS, divergences=True),
    "rpo_bwd_kl": _spec("RPO, arXiv:2406.11704, section 3.3.2", "rpo_eta", reads_scores=True),
    "rpo_fwd_kl": _spec("RPO, forward KL", "rpo_eta", reads_scores=True),
    "rpo_sq": _spec("RPO, squared distance", "rpo_eta", reads_scores=True),
    "sft": _spec(
        "supervised fine-tuning",
        file="supervised",
        needs_reference=False,
        weighting=False,
        reads="any",
        reward="log_prob",
    ),
    "cpo": _spec(
        "CPO, arXiv:2401.08417",
        "label_smoothing",
        "soft_labels",
        "alphapo_alpha",
        file="reference_free",
        needs_reference=False,
        weighting=False,
        reward="log_prob",
    ),
    "simpo": _spec(
        "SimPO, arXiv:2405.14734; AlphaPO, arXiv:2501.03884",
        "label_smoothing",
        "soft_labels",
        "simpo_gamma",
        "alphapo_alpha",
        file="reference_free",
        needs_reference=False,
        weighting=False,
        reward="mean_log_prob",
    ),
    "orpo": _spec(
        "ORPO, arXiv:2403.07691",
        file="reference_free",
        needs_reference=False,
        weighting=False,
        scores_prompt=True,
        reward="mean_log_prob",
    ),
    "kto": _spec(
        "KTO, arXiv:2402.01306, eq. 7", *LABEL_WEIGHTS, file="unpaired", reads="labels", weighting=False, measures_kl=True
    ),
    "apo_zero_unpaired": _spec(
        "APO, arXiv:2408.06266, unpaired", *LABEL_WEIGHTS, file="unpaired", reads="labels", weighting=False
    ),
    "bco": _spec("BCO, arXiv:2404.04656", *LABEL_WEIGHTS, file="unpaired", reads="labels", weighting=False, runs_delta=True),
    "plackett_luce": _spec("DPO, arXiv:2305.18290, A.3", file="listwise", reads="lists", weighting=False),
    "all_pairs": _spec("LiPO, arXiv:2402.01878", "list_weights", file="listwise", reads="lists", weighting=False),
    "best_vs_rest": _spec("S-DPO, arXiv:2406.09215", file="listwise", reads="lists", weighting=False),
    "reward": _spec(
        "Bradley-Terry reward model, arXiv:2204.05862",
        "label_smoothing",
        "soft_labels",
        "margins",
        "reward_center_coef",
        needs_reference=False,
        weighting=False,
        reward_head=True,
        reward="head",
    ),
    "custom": _spec("the user's own function", "module", *LOGIT_TERMS, "label_smoothing", file="custom", divergences=True),
}
"""Every `objective.loss_type`."""

ALIASES: dict[str, str] = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "slic": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "sppo": "sppo_hard",
    "apo": "apo_zero",
    "kto_pair": "kto",
    "rpo": "rpo_bwd_kl",
    "lipo": "all_pairs",
    "rm": "reward",
}
"""Names that others give, for the hint of an error message."""

GENERAL_OPTIONS = frozenset(
    {"loss_type", "loss_weights", "beta", "nll_coef", "f_divergence", "f_alpha", "ld_alpha", "wpo", "row_weights"}
)
"""Options of `objective` that are not one loss's own."""


def needs_reference(loss_types: list[str]) -> bool:
    """Whether any of the losses reads the reference."""
    return any(SPECS[name].needs_reference for name in loss_types)


def couples_batch(options: ObjectiveConfig) -> bool:
    """Whether any of the losses needs the whole global batch at once."""
    return runs_delta(options) or any(SPECS[name].couples_batch for name in options.loss_types)


def runs_delta(options: ObjectiveConfig) -> bool:
    """Whether rewards are shifted by their running mean."""
    return options.bco_running_delta or any(SPECS[name].runs_delta for name in options.loss_types)


def measures_kl(loss_types: list[str]) -> bool:
    """Whether any of the losses is measured against the KL of mismatched answers."""
    return any(SPECS[name].measures_kl for name in loss_types)


def has_reward_head(loss_types: list[str]) -> bool:
    """Whether a scalar head is trained instead of the model's own."""
    return any(SPECS[name].reward_head for name in loss_types)


def kinds_of(loss_types: list[str]) -> list[str]:
    """The kinds of rows that the losses read: one, where they go together."""
    kinds = dict.fromkeys(SPECS[name].reads for name in loss_types)
    return [kind for kind in kinds if kind != "any"] or ["examples"]


def kind_of(loss_types: list[str]) -> str:
    """The kind of rows that the losses of a checked configuration read."""
    (kind,) = kinds_of(loss_types)
    return kind


def reading_of(options: ObjectiveConfig) -> Reading:
    """The kind of rows, and which of their values are read."""
    is_read = {
        "margin": options.margins,
        "weight": options.row_weights,
        "label_probability": options.soft_labels,
        "score": any(SPECS[name].reads_scores for name in options.loss_types),
    }
    return Reading(kind_of(options.loss_types), frozenset(name for name, on in is_read.items() if on))


def scores_prompt(loss_types: list[str]) -> bool:
    """Whether any of the losses reads the log-probs of the prompt's tokens."""
    return any(SPECS[name].scores_prompt for name in loss_types)
