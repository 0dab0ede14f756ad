"""The lines that a training run writes to stderr, each once, from rank 0."""

from __future__ import annotations

import math

import torch

from megadpo.checkpoint.peft import why_peft_cannot
from megadpo.checkpoint.sharded import is_checkpoint, open_checkpoint
from megadpo.config.schema import ObjectiveConfig, TrainConfig
from megadpo.config.sources import eval_label
from megadpo.console.heartbeat import write_line
from megadpo.data.rows.report import DataReport, counted
from megadpo.data.rows.sources import split_taken
from megadpo.data.rows.stream import Position
from megadpo.model.adapters.spec import AdapterSpec, adapter_shapes
from megadpo.model.families import logical_shapes
from megadpo.model.shape import Experts
from megadpo.parallel.world import rank
from megadpo.platform.device import bf16_is_slow
from megadpo.training.setup import RunSetup


def log(line: str) -> None:
    """A line for the user, from rank 0, with its secrets hidden."""
    if rank() == 0:
        write_line(line)


def log_setup(setup: RunSetup) -> None:
    """Data, layout, device and dtype of the run that is about to start."""
    for which, report in setup.reports.items():
        if which == "train" and setup.stream is not None:
            log_stream_setup(setup)
            continue
        log(f"{which}: {report.sentence()}")
        for remark in report.remarks():
            log(f"{which}: {remark}")
    if setup.reports["train"].kind == "labels" and setup.stream is None:
        log_balance(setup.config.objective, setup.reports["train"])
    positions, longest = setup.policy.shape.max_positions, setup.config.data.max_length
    if longest is None or longest > positions:
        log(
            f"warning: data.max_length is {'null' if longest is None else longest}, the model has {positions} positions "
            "(max_position_embeddings): it has not seen what is longer; set data.max_length to that or less"
        )
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(setup.policy.config, name, 0.0):
            log(f"the model's {name} {getattr(setup.policy.config, name)} is not used: training runs with dropout 0")
    if setup.policy.shape.experts is not None:
        log(balancing_text(setup.policy.shape.experts, setup.config.train, setup.config.reference.router_replay))
    for warning in dict.fromkeys(model.warning for model in (setup.policy, setup.reference)):
        if warning is not None:
            log(f"warning: {warning}")
    if setup.policy.has_new_head:
        log(f"{setup.policy.path} has no scalar head: it gets a new one, drawn from train.seed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    noun = setup.reports["train"].noun
    steps, rows = counted(setup.num_steps, "step"), counted(setup.config.train.pairs_per_step, noun)
    log(f"{steps} of {rows}, {setup.layout}, {setup.dtype} on {device}")
    if setup.dtype is torch.bfloat16 and bf16_is_slow():
        log("warning: this processor has no instructions for bf16 and is many times faster in fp32; set model.dtype=fp32")
    num_warmup = setup.config.train.num_warmup_steps(setup.num_steps)
    if num_warmup >= setup.num_steps > 0 and num_warmup > 0:
        option = "warmup_steps" if setup.config.train.warmup_ratio is None else "warmup_ratio"
        log(
            f"warning: train.{option} {getattr(setup.config.train, option)} is not below this run's {steps}, "
            "so the learning rate hardly rises and the model hardly changes; lower it"
        )
    if len(setup.train.groups) < setup.config.train.pairs_per_step:
        log(
            f"warning: {counted(len(setup.train.groups), noun)} are fewer than train.pairs_per_step "
            f"{setup.config.train.pairs_per_step}: a step sees some of them several times; lower it"
        )
    for name, packing in setup.eval.items():
        if len(packing.groups) < setup.reports[eval_label(name)].num_kept:
            log(f"{eval_label(name)}: {len(packing.groups)} of them are used (eval.pairs)")
    if not setup.resume and (setup.output_dir / "hf").is_dir():
        log(f"{setup.output_dir} holds this run without a checkpoint to resume from: starting over, hf/ will be replaced")


def balancing_text(experts: Experts, train: TrainConfig, is_replayed: bool = False) -> str:
    """Where a mixture's tokens go: what balances the load of its experts, if anything.

    Args:
        is_replayed: by the reference's routes.
    """
    ways = []
    if is_replayed:
        return f"{experts.count} experts: each token goes to those that the reference chose (reference.router_replay)"
    if train.router_aux_coef:
        ways.append(f"balanced by a loss of weight {train.router_aux_coef:g}")
    if train.router_bias_update_rate:
        ways.append(f"balanced by the routers' correction biases, which move by {train.router_bias_update_rate:g} a step")
    options = "train.router_aux_coef would do that"
    if experts.routing.has_correction_bias:
        options = "the routers' correction biases stay as they are; train.router_bias_update_rate would move them"
    ways = ways or [f"not balanced ({options})"]
    return f"{experts.count} experts: their load is measured (moe/…) and {' and '.join(ways)}"


def log_stream_setup(setup: RunSetup) -> None:
    """How training groups are streamed, and where that is known less of than of stored ones."""
    config = setup.config
    assert setup.stream is not None
    for source in setup.stream.sources:
        if (line := split_taken(source)) is not None:
            log(f"train: {line}")
    size = config.data.streaming_buffer
    order = (
        f"drawn from a buffer of {size:,} rows, which mixes no further than it reaches"
        if config.data.shuffle
        else "in order"
    )
    log(f"train: read as the run goes on, {order}")
    longest, capacity = config.data.max_length, config.train.tokens_per_micro_batch
    noun = setup.reports["train"].noun
    if setup.reports["train"].kind == "lists" or longest is None or 2 * longest > capacity:
        log(
            f"warning: a {noun} of more than train.tokens_per_micro_batch {capacity} tokens, which data.max_length "
            f"{'null' if longest is None else longest} does not rule out, will end the run when it comes"
        )


def log_stream(setup: RunSetup, position: Position | None) -> None:
    """What became of the rows of a stream, at the run's end; `setup.reports` has it from then on."""
    if setup.stream is None or position is None:
        return
    report = setup.reports["train"] = position.report
    for line in (report.sentence(), *report.remarks()):
        log(f"train: {line}")
    if report.kind == "labels" and report.num_desirable and report.num_undesirable:
        log_balance(setup.config.objective, report)
    elif report.kind == "labels":
        log(f"train: warning: all of them are {'' if report.num_desirable else 'un'}desirable, which teaches no difference")


def log_adapter(setup: RunSetup, adapter: AdapterSpec) -> None:
    """How much of the model is trained, and TRL's learning rate for that, where none was chosen."""
    shapes, shape = adapter_shapes(setup.policy.shape, adapter), setup.policy.shape
    of_model = logical_shapes(shape)
    trained, whole = sum(map(math.prod, shapes.values())), sum(map(math.prod, of_model.values()))
    whole += sum(math.prod(size) for name, size in shapes.items() if name not in of_model)
    kind = ("DoRA" if adapter.use_dora else "LoRA") + (", rank-stabilised" if adapter.use_rslora else "")
    names = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in adapter.modules))
    saved = f", and {', '.join(adapter.modules_to_save)} whole" if adapter.modules_to_save else ""
    share = f"{trained:,} of {whole:,} parameters ({trained / whole:.2%})"
    log(f"{kind} of rank {adapter.rank} on {names}{saved}: {share} are trained")
    options, problem = setup.config.adapter, why_peft_cannot(adapter, shape)
    if problem is not None and not options.merge:
        log(f"warning: PEFT will not load hf/ as it is: {problem}; adapter.merge or convert merge gives a whole model")
    if is_checkpoint(setup.policy.path) and not options.merge:
        log(
            f"warning: hf/ will name {setup.policy.path} as its base, which PEFT cannot open; megadpo convert export makes "
            "a model directory of it"
        )
    reference = setup.config.reference
    is_base = setup.reference_adapter is None and setup.reference is setup.policy and reference.mode != "none"
    if options.path is not None and is_base:
        log(
            f"the reference is {setup.policy.path} without any adapter; TRL's is the adapter that training begins with: "
            f"reference.{'adapter' if reference.mode == 'adapter' else 'path'}={options.path}"
        )
    if setup.config.train.learning_rate == type(setup.config.train)().learning_rate:
        log(
            f"train.learning_rate is {setup.config.train.learning_rate:g}, the default for whole models; for adapters TRL "
            "has 1e-05"
        )


def log_origin(setup: RunSetup) -> None:
    """Where the run goes on, and which newer checkpoints it leaves out, each with the reason."""
    for problem in setup.origin.left_out:
        log(f"warning: a checkpoint is left out: {problem}")
    if setup.resume:
        log(f"resuming from {setup.resume}")
        if setup.origin.changed_inputs:
            log(f"warning: changed since it was made, and accepted: {' and '.join(setup.origin.changed_inputs)}")
        if not setup.search.verify:
            log("checkpoint.verify is false: its bytes were not compared with what was written")
        elif open_checkpoint(setup.resume).files is None:
            log(f"{setup.resume} is of an older version, which wrote no hashes: its bytes cannot be verified")


def log_balance(options: ObjectiveConfig, report: DataReport) -> None:
    """How desirable and undesirable answers weigh against each other."""
    words, advice = balance(options, report)
    log(f"{words}{f'; {advice}' if advice else ''}")


def balance(options: ObjectiveConfig, report: DataReport) -> tuple[str, str]:
    """The same in words, and what to do, KTO's advice (arXiv:2402.01306, 4.2); "" where nothing is to be done."""
    undesirable = options.undesirable_weight * report.num_undesirable
    ratio = options.desirable_weight * report.num_desirable / undesirable if undesirable else math.inf
    advice = ""
    if not 0.99 <= ratio <= 1.34:
        least = undesirable / report.num_desirable
        advice = f"KTO's authors advise 1 to 4/3, as objective.desirable_weight {least:.3g} to {least * 4 / 3:.3g} gives"
    return f"desirable answers weigh {ratio:.3g} times what undesirable ones do", advice
