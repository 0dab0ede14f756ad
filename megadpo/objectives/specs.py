"""What each objective is and what it combines with: plain data, read by the option check, the documentation and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """An objective's declaration.

    Attributes:
        paper: where it comes from.
        needs_reference: whether it reads the reference's log-probs.
        divergences: whether f-divergences other than reverse_kl are defined for it.
        weighting: whether WPO weights are defined for it.
        options: options of `objective` beyond beta that it reads; any other set to something else than its default
            is refused.
        scores_prompt: whether the log-probs of the prompt's own tokens are needed.
        couples_batch: whether a pair's loss depends on other pairs of the global batch: then a forward-only pass collects
            every pair's statistics first.
    """

    paper: str
    needs_reference: bool = True
    divergences: bool = False
    weighting: bool = True
    options: frozenset[str] = field(default_factory=frozenset)
    scores_prompt: bool = False
    couples_batch: bool = False


def _spec(paper: str, *options: str, **changes: bool) -> Spec:
    return Spec(paper, options=frozenset(options), **changes)


LOGIT_TERMS = ("length_penalty", "dpop_lambda")
"""Options that change the scaled margin of a pair before the loss sees it."""

SPECS: dict[str, Spec] = {
    "sigmoid": _spec("DPO, arXiv:2305.18290; cDPO", "label_smoothing", *LOGIT_TERMS, divergences=True),
    "sigmoid_norm": _spec("length-normalised DPO (Tulu 3, arXiv:2411.15124)", divergences=True),
    "hinge": _spec("SLiC-HF, arXiv:2305.10425", *LOGIT_TERMS, divergences=True),
    "ipo": _spec("IPO, arXiv:2310.12036", "ipo_normalization", divergences=True),
    "exo_pair": _spec("EXO, arXiv:2402.00856, eq. 16", "label_smoothing", *LOGIT_TERMS, divergences=True),
    "robust": _spec("robust DPO, arXiv:2403.00409", "label_smoothing", *LOGIT_TERMS, divergences=True),
    "nca_pair": _spec("NCA, arXiv:2402.05369"),
    "bco_pair": _spec("BCO, arXiv:2404.04656 (delta 0)"),
    "sppo_hard": _spec("SPPO, arXiv:2405.00675"),
    "aot": _spec("AOT, arXiv:2406.05882", "label_smoothing", weighting=False, couples_batch=True),
    "aot_unpaired": _spec("AOT, arXiv:2406.05882", "label_smoothing", weighting=False, couples_batch=True),
    "apo_zero": _spec("APO, arXiv:2408.06266, eq. 7"),
    "apo_down": _spec("APO, arXiv:2408.06266, eq. 8"),
    "discopop": _spec("DiscoPOP, arXiv:2406.08414, eq. 5", "discopop_tau", *LOGIT_TERMS, divergences=True),
    "sft": _spec("supervised fine-tuning on the chosen answers", needs_reference=False),
    "cpo": _spec("CPO, arXiv:2401.08417", "label_smoothing", "alphapo_alpha", needs_reference=False, weighting=False),
    "simpo": _spec(
        "SimPO, arXiv:2405.14734; AlphaPO, arXiv:2501.03884",
        "label_smoothing",
        "simpo_gamma",
        "alphapo_alpha",
        needs_reference=False,
        weighting=False,
    ),
    "orpo": _spec("ORPO, arXiv:2403.07691", needs_reference=False, weighting=False, scores_prompt=True),
    "custom": _spec("the user's own function", "module", *LOGIT_TERMS, "label_smoothing", divergences=True),
}
"""Every `objective.loss_type`."""

GENERAL_OPTIONS = frozenset({"loss_type", "loss_weights", "beta", "nll_coef", "f_divergence", "f_alpha", "ld_alpha", "wpo"})
"""Options of `objective` that are not one loss's own."""


def needs_reference(loss_types: list[str]) -> bool:
    """Whether any of the losses reads the reference."""
    return any(SPECS[name].needs_reference for name in loss_types)


def couples_batch(loss_types: list[str]) -> bool:
    """Whether any of the losses needs the whole global batch at once."""
    return any(SPECS[name].couples_batch for name in loss_types)


def scores_prompt(loss_types: list[str]) -> bool:
    """Whether any of the losses reads the log-probs of the prompt's tokens."""
    return any(SPECS[name].scores_prompt for name in loss_types)
