"""Every option of megadpo: one dataclass tree, with what each option means. `validation/load.py` reads and checks it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megadpo.config import yaml_core
from megadpo.config.given import described, is_given
from megadpo.errors import UserError
from megadpo.secrets.redact import redacted, redacted_paths


@dataclass
class ModelConfig:
    path: str = ""
    """Directory of the Hugging Face model to train (config.json, safetensors, tokenizer), or its id on the Hub. Required."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; null = `main`."""
    dtype: str = "auto"
    """Arithmetic of the forward and backward pass: `fp32`, `bf16` (with fp32 master weights), or `auto`: bf16 on CUDA,
    fp32 on CPU. `float32`, `torch.float32`, `bfloat16` and `torch.bfloat16` are read as these."""
    kernels: str = "auto"
    """How log-probs are made of logits: `native` (C++ or CUDA, compiled on first use where the installation did not),
    `torch`, or `auto`: native where it is to be had."""
    attention: str = "auto"
    """The kernel of attention: `cpu_flash`, `flash_attn`, `transformer_engine`, `varlen` (torch's; these in bf16 on CUDA),
    `flex` (torch's FlexAttention, on CUDA), `buckets` (padded batches, on CUDA, slower), `sdpa` (anywhere, slowest), or
    `auto`: the first of them that can be used."""
    linear_attention: str = "auto"
    """The kernel of linear attention, of models that have such layers: `fla` (flash-linear-attention, in bf16 on CUDA;
    untried), `torch` (anywhere), or `auto`: fla where it can be used."""
    small_ops: str = "auto"
    """What computes RMSNorm, SwiGLU and rope: `torch`, `triton` (one kernel each way, on CUDA), or `auto`: triton on CUDA
    where that is installed."""
    expert_products: str = "auto"
    """How a mixture's experts are multiplied: `loop` (one expert after the other, each a module of its own), `grouped` (all
    of a layer in one operation, product by product), `grouped_mm` (torch's kernel for all of them, which reads a copy of
    their weights), or `auto`: grouped; the loop under ZeRO stage 3, for experts with biases and where a rank has one
    expert; always the loop for experts with adapters or in 4 bits."""
    layers: str = "local"
    """Whose linear layers and norms: `local` (Megatron's, and ours), or `transformer_engine` on CUDA where that is installed
    (`engine: megatron`, no experts, no offloaded activations)."""
    fp8: bool = False
    """With `layers: transformer_engine` on GPUs that have it: multiply in FP8 inside the layers, each tensor scaled by its
    own largest value (so numbers depend on the micro-batch, as far as FP8 rounds)."""
    quantization: str = "none"
    """How the frozen weights of the layers are held with `adapter.kind: lora`: `none` (in `dtype`), or `nf4`: in 4 bits, by
    bitsandbytes (QLoRA, arXiv:2305.14314), each rank's part for itself. Embedding, norms and head stay in `dtype`."""
    quantization_block_size: int = 64
    """With `nf4`: weights that share a scale; 32, 64, 128, 256, 512, 1024, 2048 or 4096."""
    double_quantization: bool = True
    """With `nf4`: hold the scales in 8 bits themselves, which saves 0.37 bits a weight."""


@dataclass
class AdapterConfig:
    kind: str = "none"
    """What is trained: `none` = every weight of the model; `lora` = low-rank adapters beside its linear layers, the model
    itself frozen (arXiv:2106.09685); the reference is then the model with its adapters off."""
    rank: int = 16
    """Rank of each adapter's two matrices."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of an adapter's input, in [0, 1)."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train each row's magnitude beside the direction that the adapter changes (DoRA, arXiv:2402.09353)."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers, as in PEFT: `all-linear` (all but the head), a list of names (`[q_proj, v_proj]`), or a regular
    expression over whole names (`.*self_attn.*`). By name also the head and the embedding (`lm_head`, `embed_tokens`)."""
    layers_to_transform: list[int] | None = None
    """Numbers of the layers that get adapters, from 0; null = all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole beside the adapters and saved with them: `embed_tokens`, `lm_head`, `norm`."""
    init: str = "kaiming"
    """Where a new adapter begins: `kaiming` (A uniform, B zero: PEFT's default), `gaussian` (A normal, B zero), `pissa`
    (the largest singular values of the weights, arXiv:2404.02948) or `olora` (a part of their QR decomposition,
    arXiv:2406.01775); these two are taken out of the frozen weights, and `hf/` has an adapter of the model as it was, of
    twice the rank."""
    path: str | None = None
    """PEFT directory of an adapter to go on training; its adapter_config.json then says all but `dropout` and `merge`. null
    = a new one."""
    merge: bool = False
    """Export the model with the adapter added to its weights in place of a PEFT directory."""


@dataclass
class ReferenceConfig:
    mode: str = "auto"
    """`auto`: `none` for losses that read no reference (sft, cpo, simpo, orpo, reward), `adapter` with `adapter.kind:
    lora` and no `reference.path`, else `resident`. `adapter`: the policy's own model with its adapters off, or with
    `reference.adapter`. `resident`: a frozen second model is held in memory with the policy. `precomputed`: its log-probs
    are computed first, cached on disk, and the reference is freed. `cached`: it is resident in the first epoch, which
    fills the same cache; then it is freed. `none`: for losses that read no reference."""
    path: str | None = None
    """Model directory of the reference; null = `model.path`."""
    adapter: str | None = None
    """With `mode: adapter`: PEFT directory of the adapter that the reference has; null = the model without any."""
    tokens_per_micro_batch: int | None = None
    """Tokens of a micro-batch while log-probs are precomputed (nothing is kept for a backward, so more fit); null =
    `train.tokens_per_micro_batch`."""
    sync_every: int | None = None
    """TR-DPO: every this many steps a resident reference moves towards the policy; null = it never moves."""
    mixup_alpha: float = 0.6
    """TR-DPO: how far it moves, in (0, 1]: reference = alpha policy + (1 - alpha) reference."""
    router_replay: bool = False
    """In a mixture of experts, training sends each of the policy's tokens to the experts that the reference chose for it."""


@dataclass
class DataConfig:
    train: Any = None
    """Training pairs: a file, directory or Hub id, or a list of those or of `{path, weight, split, subset, columns}`;
    from Python also a list of dicts, a DataFrame or what `datasets` has. Required for training."""
    eval: Any = None
    """Held-out pairs, given like `data.train`, or several sets of them, each evaluated on its own: `{name: source, …}`; from
    Python also a dict of what `data.train` takes, or a DatasetDict; null = no evaluation. See docs/held_out.md."""
    streaming: bool = False
    """Read, tokenise and pack `data.train` while training, in bounded memory and without a pass over it first; needs
    `train.steps`. The data is read again from its beginning where it ends before them."""
    streaming_buffer: int = 10_000
    """With `streaming` and `shuffle`: rows in memory, of which the next one is drawn."""
    shuffle: bool = True
    """Draw pairs in a new seeded order each epoch; false keeps the file's order."""
    step_tokens_multiple_of: int | None = None
    """Exchange pairs between nearby steps until each step's tokens come just below a multiple of this (best:
    `train.tokens_per_micro_batch` x replicas), which fills micro-batches; null = steps as they were drawn."""
    max_length: int | None = 1024
    """Longest prompt + completion in tokens; null = no limit."""
    truncation: str = "prompt_left"
    """What gives way beyond `max_length`: `prompt_left` (the prompt's beginning, then the completion's end),
    `keep_start` or `keep_end` of the whole sequence."""
    chat_template: str | None = None
    """A Jinja chat template, as a file or as its text; null = the tokenizer's own."""
    share_prompts: bool = True
    """Compute a prompt once for both of its responses; false = once per response (the numbers are the same)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames: our field name -> the file's field name, for example `{chosen: better, rejected: worse}`."""
    ignore_columns: list[str] = field(default_factory=list)
    """Fields of the files that are not looked at, for example `[system, images]`; without a word about them."""
    allow_no_prompt: bool = False
    """Take two texts without `prompt` and without a common beginning as answers to nothing; false = refuse such rows."""
    num_workers: int | None = None
    """Processes that tokenise; null = one per CPU core."""
    cache_dir: str | None = None
    """Where tokenised data and reference log-probs are kept; null = `$MEGADPO_CACHE`, else `~/.cache/megadpo`."""


@dataclass
class ObjectiveConfig:
    loss_type: str | list[str] = "sigmoid"
    """The preference loss, or a list of losses that are added up: see docs/objectives.md."""
    loss_weights: list[float] | None = None
    """A weight for each of the losses; null = 1 for each."""
    beta: float = 0.1
    """Strength of the pull towards the reference: rewards are beta times the log-ratio."""
    label_smoothing: float = 0.0
    """Probability that a preference label is flipped, in [0, 0.5); `exo_pair` needs it above 0."""
    f_divergence: str = "reverse_kl"
    """How distance from the reference is measured: `reverse_kl` (DPO), `forward_kl`, `js` or `alpha`."""
    f_alpha: float = 0.5
    """The alpha of `f_divergence: alpha`; 1 is reverse_kl."""
    ld_alpha: float | None = None
    """LD-DPO: weight, in [0, 1], of completion tokens beyond the shorter answer's length; null = 1."""
    wpo: bool = False
    """WPO: each pair's loss is multiplied by how likely the policy finds its two answers (held fixed)."""
    nll_coef: float = 0.0
    """Times the mean negative log-prob of the chosen tokens, added to the loss (TRL's rpo_alpha and cpo_alpha)."""
    row_weights: bool = False
    """Each row's loss is multiplied by the row's `weight` (>= 0); metrics other than the loss are not."""
    margins: bool = False
    """ODPO, and the margin of reward models: each pair's `margin` (>= 0) is taken off the loss's logits."""
    soft_labels: bool = False
    """Each pair's `label_probability` says how likely its chosen answer is the better one."""
    length_penalty: float = 0.0
    """R-DPO: times (chosen length - rejected length), added to the scaled margin."""
    dpop_lambda: float = 0.0
    """Smaug's DPOP: times what the chosen answer has fallen below the reference, taken off the margin."""
    ipo_normalization: str = "mean"
    """`ipo` on per-token scores (`mean`) or summed ones (`sum`)."""
    bco_running_delta: bool = False
    """`bco_pair`: rewards are shifted by the running mean of all rewards so far (kept in the checkpoint)."""
    rpo_eta: float = 1.0
    """`rpo_*`: scale of the given scores (`chosen_score`, `rejected_score`)."""
    desirable_weight: float = 1.0
    """Weight of desirable answers in `kto`, `bco` and `apo_zero_unpaired`."""
    undesirable_weight: float = 1.0
    """Weight of undesirable answers in `kto`, `bco` and `apo_zero_unpaired`."""
    list_weights: str = "uniform"
    """What each two responses weigh in `all_pairs`: `uniform`, `score` (difference of scores) or `lambda` (LiPO)."""
    reward_center_coef: float = 0.0
    """`reward`: times (reward of chosen + reward of rejected)^2, added to the loss: keeps rewards around zero."""
    discopop_tau: float = 0.05
    """Temperature of `discopop`'s mixture."""
    simpo_gamma: float = 0.5
    """Target margin of `simpo`."""
    module: str | None = None
    """The function of `loss_type: custom`, as path.py:function: see examples/custom_objective.py."""
    alphapo_alpha: float = 0.0
    """AlphaPO: alpha of the reward (1 - p^-alpha) / alpha in `cpo` and `simpo`; 0 = the log-prob."""

    @property
    def loss_types(self) -> list[str]:
        """The losses, as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    @property
    def terms(self) -> list[str]:
        """The losses, and "nll" where the NLL term is on: what is added up."""
        return self.loss_types + (["nll"] if self.nll_coef else [])

    @property
    def weights(self) -> list[float]:
        """The weight of each loss."""
        return self.loss_weights or [1.0] * len(self.loss_types)


@dataclass
class ParallelConfig:
    engine: str = "megatron"
    """Who keeps gradients and optimizer state: `megatron` (DDP + DistributedOptimizer) or `deepspeed` (any ZeRO stage)."""
    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool | None = None
    """Sequence parallelism inside the tensor-parallel group; null = on with `tensor` > 1."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved 1F1B): smaller bubbles, more messages; above 1 needs `pipeline` > 1."""
    pipeline_layout: str | list[int] | None = None
    """Layers of each stage as a list, or as text (`3,4,4,3`); with `virtual_pipeline` of each chunk, in the model's order
    (chunk c is on stage c modulo `pipeline`); null = as even as possible, first and last the lightest."""
    context: int = 1
    """Context-parallel size: ranks that each hold a part of a micro-batch's tokens."""
    context_method: str = "auto"
    """How attention crosses the parts: `ulysses` (all-to-all over heads), `allgather` (of keys and values; for more ranks
    than heads), or `auto`: ulysses where the key-value heads divide."""
    expert: int = 1
    """Expert-parallel size: ranks that share the experts of a layer, out of `tensor` x `context` x data-parallel ones."""
    expert_tensor: int = 1
    """Tensor-parallel size inside an expert; `tensor` is for all else."""
    zero_stage: int = 1
    """What is sharded over data-parallel ranks: 1 = optimizer state; with `engine: deepspeed` also 0 = nothing,
    2 = gradients too, 3 = parameters too (the frozen reference's as well)."""
    offload: str = "none"
    """Where optimizer state, and in ZeRO stage 3 parameters, are kept between their uses: `none`, `cpu` (with `engine:
    megatron` AdamW's moments, updated on the device; only on CUDA) or, with `engine: deepspeed`, `nvme` (stage 3)."""
    offload_dir: str | None = None
    """Directory on a local disk for `offload: nvme`."""
    overlap: bool | None = None
    """With `engine: megatron`: overlap summing gradients and gathering updated parameters over data-parallel ranks with
    computation; null = on CUDA."""
    gradient_dtype: str = "fp32"
    """With `engine: megatron`: what gradients are kept in while a step's micro-batches add to them, and sent in to other
    data-parallel ranks: `fp32`, or `bf16` for a bf16 model (half of the memory and of the messages; the ranks' parts are
    added up in fp32), in any spelling of `model.dtype`."""
    gradient_accumulation_fusion: bool | None = None
    """With `engine: megatron`: add weight gradients of linear layers by one product to where they are kept (by Apex's
    extension where that is installed, else by torch) instead of one by one; null = on CUDA, and with
    `schedule.zero_bubble`."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON file with more settings; one that contradicts an option here is refused."""


@dataclass
class PipelineScheduleConfig:
    name: str = "megatron"
    """Which schedule runs micro-batches through the pipeline's stages: `megatron`'s, or our own `1f1b` (over the chunks of
    `parallel.virtual_pipeline` too): the same order and the same numbers; messages are asynchronous."""
    reference: str = "before"
    """When a resident reference runs: `before` the policy, or `interleaved` (with `name: 1f1b`): its forwards fill the
    policy's bubbles, those of the next step this step's end."""
    split_pairs: bool = False
    """Send a micro-batch's chosen and rejected answers through the stages one after the other (with `name: 1f1b`): the
    same numbers, and finer fill and drain where prompts are short; slower where they are long. `false` = together."""
    zero_bubble: bool = False
    """Do the products of weight gradients, which no other stage waits for, after what others wait for (ZB-H1, with `name:
    1f1b` and `engine: megatron`, without recomputed layers or offloaded activations): less waiting, the numbers of
    `gradient_accumulation_fusion: true`; every stage keeps as many micro-batches as the first."""


@dataclass
class TrainConfig:
    steps: int | None = None
    """Optimizer steps; give this or `epochs`, not both (on the command line, either displaces the one of the file)."""
    epochs: float | None = None
    """Passes over the data (may be a fraction); with neither this nor `steps`: 1."""
    pairs_per_step: int = 64
    """Pairs in the global batch of a step, over all processes; each weighs exactly the same."""
    tokens_per_micro_batch: int = 8192
    """Most tokens that go through a model replica at once (over all its context ranks); changes memory and speed, not the
    result."""
    optimizer: str = "adamw"
    """What updates the weights: `adamw`, `adamw_8bit` (bitsandbytes'), `sgd`, `lion`, or `muon` (matrices of the layers by
    Muon, the rest by AdamW); see docs/optimizers.md."""
    momentum: float | None = None
    """Momentum of `sgd` and `muon`, in [0, 1); null = 0.9 and 0.95."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Peak learning rates of some parameters in place of `learning_rate`: pattern -> rate. A pattern is a regular expression
    over Hugging Face names, of which the beginning up to a dot, `.weight` and `.bias` may be left out (`embed_tokens`,
    `layers\\.[0-3]\\..*`); the first that matches counts."""
    freeze: list[str] = field(default_factory=list)
    """Patterns, as in `learning_rates`, of parameters that are not trained."""
    min_learning_rate: float = 0.0
    """Where the schedule ends."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    warmup_ratio: float | None = None
    """Share of the run's steps over which it rises, in [0, 1], in place of `warmup_steps`."""
    schedule: str = "cosine"
    """How the learning rate falls after the warm-up, as in transformers: `cosine`, `linear`, `constant`,
    `cosine_with_restarts`, `polynomial`, `inverse_sqrt`, or `wsd` (warm-up, stable, decay)."""
    schedule_cycles: int = 1
    """`cosine_with_restarts`: how many times it falls."""
    schedule_power: float = 1.0
    """`polynomial`: its power."""
    decay_ratio: float = 0.1
    """`wsd`: share of the run's steps, its last ones, over which the learning rate falls, in (0, 1]."""
    decay_shape: str = "cosine"
    """`wsd`: how it falls then: `cosine`, `linear` or `1-sqrt`."""
    weight_decay: float = 0.0
    """Weight decay: decoupled, of `sgd` an L2 term of the gradient."""
    decay_norms_and_biases: bool = False
    """Let norms and biases decay, too; false = as transformers does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of `adamw` and `lion` (whose paper has 0.9 and 0.99)."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    moments_dtype: str = "fp32"
    """How AdamW's two moments are kept between steps: `fp32`, or `bf16` (half their memory; the arithmetic stays fp32's, and
    rounding is right on average over the steps), in any spelling of `model.dtype`. With `engine: megatron`."""
    neftune_alpha: float | None = None
    """NEFTune (arXiv:2310.05914): uniform noise of at most alpha / sqrt(length x hidden size) on the policy's embeddings in
    training, the length that of prompt and longest response; the paper has 5, 10 and 15. null = none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    on_spike: str = "warn"
    """What to do with a step whose loss or gradient norm is not finite, or far above those of the last 128 steps: `warn`
    (train on it and say so; one that is not finite ends the run), `skip` (update nothing and go on) or `stop`."""
    spike_deviations: float = 6.0
    """How far above their mean is far, in standard deviations of the last 128 steps (at least a tenth of the mean each)."""
    recompute: str = "auto"
    """Activations computed again in the backward pass to save memory: `none`, `small` (results of cheap operations: norms,
    SwiGLU, rope by Triton's kernels, copied keys and values), `selective` (attention) or `full` (layers). `auto`: `small` on
    CUDA where Triton's kernels compute these operations in local layers, else `none`."""
    recompute_method: str = "uniform"
    """With `recompute: full`: `uniform` keeps the input of every unit of `recompute_num_layers` layers; `block` recomputes
    that many layers of each pipeline stage (or chunk of one) and keeps what the others computed."""
    recompute_num_layers: int | None = None
    """With `recompute: full`: layers of a unit (`uniform`; it divides the layers of every stage) or layers recomputed
    (`block`); null = units of 1."""
    activation_offload: str = "none"
    """Where activations wait for their backward pass: `none` (where they are), `cpu` (pinned host memory; only on CUDA) or
    `disk` (files in `activation_offload_dir`); with `recompute: full` these are the units' inputs."""
    activation_offload_dir: str | None = None
    """Directory for `activation_offload: disk`, on a fast local disk or in shared memory."""
    activation_offload_window_mib: int = 256
    """MiB of activations that may wait to be moved away, and that are fetched ahead in the backward pass."""
    router_aux_coef: float = 0.0
    """Weight of the routers' load-balancing loss of a mixture of experts, taken over the global batch; not 0 costs a further
    forward pass."""
    router_bias_update_rate: float = 0.0
    """What a router's correction bias (`e_score_correction_bias`) moves by after each step, towards an even load of the
    global batch; 0 leaves it as the model has it."""
    hang_timeout: float = 600.0
    """Seconds after which a rank that gives no sign of life, or a step that is so much longer than any before it, counts as
    a hang: the rank is named, the stacks of all go to `output_dir`/stacks, and the run ends with status 1; 0 = wait on."""
    seed: int = 42
    """Seed of the data order and of every random number."""

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up in a run of `num_steps`: `warmup_steps`, or `warmup_ratio` of them, rounded up."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(num_steps * self.warmup_ratio)


@dataclass
class EvalConfig:
    every: int = 0
    """Evaluate on `data.eval` every this many steps; 0 = only after the last step."""
    pairs: int | None = None
    """Use only the first this many pairs of each set of `data.eval`; null = all."""
    at_start: bool = False
    """Evaluate before the first step, too, as step 0."""
    best_metric: str | None = None
    """Keep the checkpoint of the best evaluation by this metric, beyond `checkpoint.keep`, and export it, not the last one:
    named as in metrics.jsonl (`eval_loss`, `eval_NAME_rewards/accuracies`), with or without `eval_`; null = the last."""
    best_direction: str = "auto"
    """What is better of `best_metric`: `max`, `min`, or `auto`: less of a loss, more of accuracies and margins; of others it
    must be said."""
    patience: int | None = None
    """End the run after this many evaluations without a better `best_metric`; null = never."""
    min_improvement: float = 0.0
    """By how much `best_metric` must be better than the best before, to count for `patience`."""


@dataclass
class CheckpointConfig:
    every: int = 0
    """Save the full training state every this many steps; 0 = only as `at_end` says."""
    at_end: bool = True
    """Save it, too, after the last step, and when the run stops before that (SIGTERM, SIGUSR1, the first Ctrl-C, the
    deadline); false = what came after the last of `every` is lost then."""
    before_deadline: float | str | None = None
    """Stop in time to have saved so many seconds after the run began, or (`slurm`) before the SLURM job's time is over: as
    after SIGTERM, with exit status 75; null = no deadline."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint in `output_dir`, if there is one; `never`; or the path of a step
    directory to begin with (the same command again goes on from the newest checkpoint that came of it)."""
    changed_inputs: str = "refuse"
    """On resuming, where the files of the model or the reference, the tokenizer, the template or the training pairs are not
    those that the checkpoint was made with: `refuse`, or `accept` (with a warning). `accept` takes them under other names,
    too."""
    verify: bool = True
    """Compare every byte of a checkpoint with the hashes that were written with it, before it is loaded."""
    asynchronous: bool | None = None
    """Write checkpoints behind the step loop, which then waits only for a copy in host memory. Default: where host memory
    has room for twice that copy."""
    on_failed_write: str = "stop"
    """When a checkpoint or a line of metrics cannot be written (a full disk): `stop`, with one sentence, or `skip`: go on
    without it, with a warning."""


@dataclass
class LoggingConfig:
    every: int = 1
    """Write metrics every this many steps, at evaluations and at the end."""
    tensorboard: bool = True
    """Write TensorBoard event files under `output_dir`."""
    report: bool = True
    """Write `report.html`, the page with curves and findings, when the run ends."""
    model_card: bool = True
    """Write `hf/README.md`, the model card: data, objective, results, versions, command, how to load it."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers that get the metrics and the configuration, too: any of wandb, mlflow, trackio, swanlab
    (docs/watching.md)."""
    project: str = "megadpo"
    """The run's project in the trackers."""
    run_name: str | None = None
    """The run's name there; null: the last part of output_dir."""
    tags: list[str] = field(default_factory=list)
    """Its tags there."""
    directory: str | None = None
    """Where trackers write on this machine; null: `output_dir`/trackers, trackio its own directory."""
    offline: bool = False
    """No tracker sends anything."""
    peak_tflops: float | None = None
    """TFLOP/s of a device, which the metric mfu is a share of; null: of its name for bf16 on a known GPU, else there is no
    mfu."""
    profile_steps: list[int] | None = None
    """[first, last]: these steps are recorded by torch's profiler, into `output_dir`/profile."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """The ranks that record them."""


@dataclass
class HubConfig:
    push: str | None = None
    """Repository on the Hugging Face Hub, OWNER/NAME, that `hf/` is pushed to when the run has finished; null = none."""
    private: bool = True
    """Whether a repository that is made then is private."""
    revision: str | None = None
    """Branch that is pushed to; null = `main`."""


@dataclass
class Config:
    """All options. Built by `load_config`; attributes may be changed before a run, which checks them again."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: PipelineScheduleConfig = field(default_factory=PipelineScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    output_dir: str = ""
    """Directory for config.yaml, metrics.jsonl, checkpoints/ and hf/. Required for training."""

    def require_for_training(self) -> None:
        """Raises UserError where an option that training cannot do without is missing."""
        for name, value in (
            ("model.path", self.model.path),
            ("data.train", self.data.train),
            ("output_dir", self.output_dir),
        ):
            if value is None or (isinstance(value, (str, list)) and not value):
                raise UserError(
                    f"{name} is required for training: set it in the configuration or as {name}=… on the command line"
                )

    def resolved(self) -> Config:
        """A copy in which the defaults that follow from other options are spelled out (none of the machine's)."""
        config = copy_config(self)
        if config.parallel.sequence is None:
            config.parallel.sequence = config.parallel.tensor > 1
        if config.reference.path is None:
            config.reference.path = config.model.path or None
        if config.reference.mode == "precomputed" and config.reference.tokens_per_micro_batch is None:
            config.reference.tokens_per_micro_batch = config.train.tokens_per_micro_batch
        if config.train.steps is None and config.train.epochs is None:
            config.train.epochs = 1.0
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars; rows from Python appear as a text that says what they are."""
        return _plain(self)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, in the order of this file, with secrets in it hidden; in paths that are here,
        which are read again, only the credentials of URLs."""
        plain = self.resolved().to_dict()
        shown = redacted(plain)
        for dotted in (*PATHS, *DATA_PATHS):
            section, _, name = dotted.rpartition(".")
            given, written = (plain[section], shown[section]) if section else (plain, shown)
            written[name] = redacted_paths(given[name])
        return yaml_core.dump(shown, sort_keys=False, allow_unicode=True)


PATHS = (
    *(
        "model.path",
        "adapter.path",
        "reference.path",
        "reference.adapter",
        "objective.module",
        "parallel.offload_dir",
        "parallel.deepspeed_config",
    ),
    *("train.activation_offload_dir", "checkpoint.resume", "output_dir"),
)
"""Options that name a path and in which `~` and `$VARIABLES` are replaced when they are read."""
DATA_PATHS = ("data.train", "data.eval", "data.chat_template", "data.cache_dir", "logging.directory")
"""Those in which they are replaced where the path is used."""


def copy_config(config: Config) -> Config:
    """A deep copy that keeps the very same rows from Python."""
    data = dataclasses.replace(config.data, train=None, eval=None)
    result = copy.deepcopy(dataclasses.replace(config, data=data))
    result.data.train, result.data.eval = config.data.train, config.data.eval
    return result


def _plain(value: Any) -> Any:
    if is_given(value):
        return described(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
