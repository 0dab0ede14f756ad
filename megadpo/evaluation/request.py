"""What is to be evaluated: a model, what it is compared with and the data; from options, or from a run's directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megadpo.checkpoint.hf import hf_directory, read_json
from megadpo.checkpoint.peft import base_of, is_adapter, is_reward_adapter
from megadpo.config.schema import Config
from megadpo.config.sources import eval_sets
from megadpo.errors import UserError
from megadpo.evaluation.scores import KINDS, kind_of_objective
from megadpo.evaluation.subsets import EvaluationData
from megadpo.model.families import head_of
from megadpo.objectives.specs import measures_kl, needs_reference
from megadpo.validation.load import load_config

NO_REFERENCE = "none"
SETTINGS = ("reference.mode=precomputed",)
"""As in `megadpo logprobs`: the options of scoring (larger micro-batches) apply."""
QUANTIZATION = ("quantization", "quantization_block_size", "double_quantization")
"""Of `model`: how weights were held in training; what is evaluated is the adapter on the weights as they are in the file."""


@dataclass(frozen=True)
class Generation:
    """What is generated, by model and reference.

    Attributes:
        prompts: so many of the data's prompts, or a file of rows with `prompt`, `messages` or a pair.
        temperature: of sampling; 0: greedy.
        seed: the draws for a prompt depend on it and on the prompt's number alone.
        generator: "transformers" or "vllm".
    """

    prompts: int | str
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 42
    generator: str = "transformers"

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if isinstance(self.prompts, int) and self.prompts < 1:
            raise UserError(f"--generate must be a number of prompts from 1 up or a file, got {self.prompts}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"--top-p {self.top_p} is for sampling, and temperature 0 is greedy; add --temperature 1")


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: their names.
        task_dir: a directory with the YAML of tasks of one's own.
        limit: of each task only so many documents.
        num_fewshot: examples before each question; None: as the task says.
        apply_chat_template: whether questions are messages to the chat template in the model's directory.
    """

    tasks: tuple[str, ...]
    task_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Request:
    """An evaluation, before anything was looked at but options and directories' names.

    Attributes:
        model, reference: model directories, PEFT directories or checkpoints; no reference is None.
        config: layout, data options, dtype and objective.
        data: what is scored; nothing where only generation or tasks are asked for.
        score: the kind that the figures are of; None: what suits the model and the reference.
        chat: whether a `prompt` that is text is a message: "yes", "no", or "auto": in RewardBench's subsets.
        out: where files are written; None: nowhere.
        run: the run's directory that all this is from, if it is from one.
    """

    model: str
    reference: str | None
    config: Config
    data: tuple[EvaluationData, ...]
    score: str | None = None
    subset_column: str | None = None
    chat: str = "auto"
    out: Path | None = None
    run: str | None = None
    generation: Generation | None = None
    harness: Harness | None = None
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class RunDirectory:
    """What a run says of its evaluation: see `Request`."""

    path: Path
    config: Config
    model: str
    reference: str | None
    data: tuple[EvaluationData, ...]
    remarks: tuple[str, ...]


def open_run(path: str, overrides: Sequence[str]) -> RunDirectory:
    """The directory of a run, or the YAML file that it was started with.

    Its layout is not taken over: the numbers do not depend on it.

    Raises:
        UserError: it is neither, or an override is wrong.
    """
    directory = Path(path)
    file = directory / "config.yaml" if directory.is_dir() else directory
    if directory.is_dir() and not file.is_file():
        hint = "a model is given as --model DIR" if (directory / "config.json").is_file() else "a run has a config.yaml"
        raise UserError(f"{path} is not the directory of a run; {hint}")
    trained = load_config(file)
    if not directory.is_dir():
        directory = Path(trained.output_dir)
        if not trained.output_dir:
            raise UserError(f"{path} has no output_dir, so there is no run to evaluate; give the model as --model DIR")
    reference, remarks = _reference_of(trained)
    config = load_config(_for_scoring(trained), overrides)
    data = [
        EvaluationData(value, name or None)
        for name, values in eval_sets(config.data.eval).items()
        for value in (values if isinstance(values, list) else [values])
    ]
    return RunDirectory(directory, config, str(directory / "hf"), reference, tuple(data), remarks)


def _reference_of(config: Config) -> tuple[str | None, tuple[str, ...]]:
    """The directory of a run's reference as it was at the first step, and what is to be said of it."""
    remarks: tuple[str, ...] = ()
    if config.model.quantization != "none":
        kind = config.model.quantization
        remarks = (f"the run held its frozen weights in 4 bits (model.quantization {kind}); here they are not quantised",)
    if config.reference.sync_every is not None:
        remarks += ("the run's reference moved (reference.sync_every); here it is what the run began with",)
    if config.reference.mode == "none":
        return None, remarks
    if config.reference.mode == "adapter" and config.reference.adapter is not None:
        return config.reference.adapter, remarks
    return config.reference.path or config.model.path, remarks


def _for_scoring(trained: Config) -> Config:
    """Of a run's options those that decide what its model gives for its data, with the defaults for all else."""
    config = Config()
    config.data, config.objective, config.eval = trained.data, trained.objective, trained.eval
    plain = {name: getattr(config.model, name) for name in QUANTIZATION}
    config.model = replace(trained.model, **plain)
    config.train.seed, config.train.tokens_per_micro_batch = trained.train.seed, trained.train.tokens_per_micro_batch
    losses = trained.objective.loss_types
    # Of pairs no KL is measured, but the options of such an objective stand with a resident reference only.
    with_reference = "resident" if measures_kl(losses) else "precomputed"
    config.reference.mode = with_reference if needs_reference(losses) else "none"
    # The export has the template that it was trained with; a relative path would be looked for from here.
    config.data.chat_template = None
    return config


def is_reward_model(path: str) -> bool:
    """Whether a model, an adapter or a checkpoint has a scalar head.

    Raises:
        UserError: there is no model.
    """
    if not Path(path).is_dir():
        raise UserError(f"--model: there is no directory {path}; give a Hugging Face model directory, or a run's directory")
    if is_adapter(path):
        return is_reward_adapter(path)
    return head_of(read_json(hf_directory(path) / "config.json")) == "reward"


def default_reference(model: str) -> str | None:
    """The base of an adapter; None for a whole model."""
    return base_of(model) if Path(model).is_dir() and is_adapter(model) else None


def check_score(score: str | None, has_reward_head: bool, reference: str | None) -> None:
    """Raises UserError where a kind of score cannot be had."""
    if score is None:
        return
    if score not in KINDS:
        raise UserError(f"--score {score!r} must be one of {', '.join(KINDS)}")
    if has_reward_head != (score == "reward"):
        has = "a scalar head and no log-probs" if has_reward_head else "no scalar head"
        raise UserError(f"--score {score}: the model has {has}; leave --score out")
    if score.endswith("log_ratio") and reference is None:
        raise UserError(f"--score {score} needs a reference; give one with --reference DIR")


def default_score(config: Config, has_reward_head: bool, reference: str | None) -> str:
    """The kind of score that suits: that of the run's objective where it can be had."""
    if has_reward_head:
        return "reward"
    kind = kind_of_objective(config.objective)
    if kind == "log_ratio":
        return kind if reference is not None else "log_prob"
    return "log_prob" if kind == "reward" else kind
