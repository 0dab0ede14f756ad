"""What is planned for, from a configuration: the model's shape by its config.json alone, adapters, and lengths of pairs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megadpo.checkpoint.hf import read_hf_config
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.config.schema import Config
from megadpo.config.sources import parse_sources
from megadpo.data.rows.dataset import prepare_groups, tokenise_job
from megadpo.data.rows.stream import GroupStream, StreamOptions
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.adapters.spec import resolve
from megadpo.model.families import shape_of, with_reward_head
from megadpo.model.shape import ModelShape, head_work
from megadpo.objectives.specs import has_reward_head, reading_of
from megadpo.planning.search import Job
from megadpo.planning.workload import ASSUMED_PROMPT, ASSUMED_RESPONSE, NUM_PAIRS, Workload, assumed_groups


def job_of(
    config: Config,
    num_devices: int,
    held: Collection[str] = (),
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Job:
    """The job of a checked configuration.

    Args:
        held: options that the command line names.
        prompt_tokens, response_tokens: medians that are assumed in place of the data's lengths.

    Raises:
        UserError: there is no model's config.json, or it is not one that can be trained.
    """
    path = config.model.path
    if not path or not Path(path).is_dir():
        what = why_no_model(path) if path else None
        raise UserError(
            f"model.path: {path} is no directory: {what}"
            if what
            else f"model.path: there is no directory {path!r}; plan reads the model's config.json in it"
        )
    hf_config = read_hf_config(path)
    if has_reward_head(config.objective.loss_types):
        hf_config = with_reward_head(hf_config, hf_config.pad_token_id)
    shape = shape_of(hf_config)
    other, train = config.reference.path, config.train
    if train.recompute_num_layers is not None or train.recompute_method != "uniform":
        held = [*held, "train.recompute"]  # these go with full alone
    return Job(
        config,
        shape,
        workload_of(config, shape, prompt_tokens, response_tokens),
        num_devices,
        held,
        reference=None if other in (None, path) else shape_of(read_hf_config(str(other))),
        adapter=None if config.adapter.kind == "none" else resolve(config.adapter, shape),
    )


def workload_of(
    config: Config, shape: ModelShape, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Workload:
    """Of the configuration's own pairs, where their files and a tokenizer are there; else of assumed lengths."""
    for name, given in (("--prompt-tokens", prompt_tokens), ("--response-tokens", response_tokens)):
        if given is not None and given < 1:
            raise UserError(f"{name} must be at least 1, got {given:g}")
    work, share = head_work(shape), config.data.share_prompts
    why_not = "as the options say"
    if prompt_tokens is None and response_tokens is None:
        store, why_not = _own_groups(config)
        if store is not None:
            source = f"the first {len(store):,} of data.train"
            return Workload.of(store, shape.hidden_size, work, source, share)
    prompt, response = prompt_tokens or ASSUMED_PROMPT, response_tokens or ASSUMED_RESPONSE
    groups = assumed_groups(prompt, response, config.data.max_length)
    cut = "" if config.data.max_length is None else f", cut to data.max_length {config.data.max_length:,}"
    source = f"assumed: prompts and responses with medians of {prompt:g} and {response:g} tokens{cut} ({why_not})"
    return Workload.of(GroupStore.of(groups), shape.hidden_size, work, source, share)


def _own_groups(config: Config) -> tuple[GroupStore | None, str]:
    """Groups of data.train, and why there are none: what would have to be downloaded is not looked at."""
    if config.data.train is None:
        return None, "there is no data.train"
    sources = parse_sources(config.data.train)
    missing = [source.name for source in sources if isinstance(source.path, str) and not _is_here(source.path)]
    if missing:
        return None, f"data.train: {missing[0]} is not here"
    try:
        if config.data.streaming:
            return _head(config), ""
        prepared = prepare_groups(config.data, config.data.train, config.model.path, reading_of(config.objective))
    except UserError as error:
        return None, str(error)
    return prepared.groups.first(NUM_PAIRS), ""


def _head(config: Config) -> GroupStore:
    """The first groups of a stream, of which the rest is not looked at."""
    reading = reading_of(config.objective)
    sources, job = tokenise_job(config.data, config.data.train, config.model.path, reading)
    return GroupStream(StreamOptions(sources, job, buffer_size=1, seed=0)).next_groups(NUM_PAIRS)


def _is_here(path: str) -> bool:
    expanded = Path(path).expanduser()
    return expanded.exists() or any(letter in path for letter in "*?[")
