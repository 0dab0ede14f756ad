"""Options are read strictly: each mistake is one sentence that says where it is and what to write instead."""

import dataclasses
import datetime
import random
import re
import string
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megadpo.config import strict
from megadpo.config.schema import Config
from megadpo.config.strict import all_keys
from megadpo.errors import UserError
from megadpo.training.output_dir import claim_output_dir
from megadpo.validation.load import load_config
from megadpo.validation.values import validate

ROOT = Path(__file__).parents[3]


def error_of(source: object, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_that_users_of_trl_know() -> None:
    config = load_config({})
    assert (config.objective.beta, config.train.learning_rate, config.data.max_length) == (0.1, 1e-6, 1024)
    assert (config.reference.mode, config.data.truncation, config.train.betas) == (
        "resident",
        "prompt_left",
        (0.9, 0.999),
    )


def test_the_contract_has_exactly_these_keys() -> None:
    contract = {
        "model": "path revision dtype kernels attention linear_attention small_ops expert_products layers fp8 quantization "
        "quantization_block_size double_quantization",
        "adapter": "kind rank alpha dropout use_rslora use_dora target_modules layers_to_transform modules_to_save init "
        "path merge",
        "reference": "mode path adapter tokens_per_micro_batch sync_every mixup_alpha router_replay",
        "data": "train eval streaming streaming_buffer "
        "shuffle step_tokens_multiple_of max_length truncation chat_template share_prompts columns "
        "ignore_columns allow_no_prompt "
        "num_workers cache_dir",
        "objective": "loss_type loss_weights beta label_smoothing f_divergence f_alpha ld_alpha wpo nll_coef length_penalty "
        "dpop_lambda ipo_normalization discopop_tau simpo_gamma module alphapo_alpha row_weights margins soft_labels "
        "bco_running_delta rpo_eta desirable_weight undesirable_weight list_weights reward_center_coef",
        "parallel": "engine tensor sequence pipeline virtual_pipeline pipeline_layout context context_method expert "
        "expert_tensor zero_stage offload offload_dir overlap "
        "gradient_dtype gradient_accumulation_fusion deepspeed_config",
        "schedule": "name reference split_pairs zero_bubble",
        "train": "steps epochs pairs_per_step tokens_per_micro_batch learning_rate min_learning_rate warmup_steps "
        "warmup_ratio schedule_cycles schedule_power decay_ratio decay_shape "
        "schedule optimizer momentum learning_rates freeze decay_norms_and_biases "
        "neftune_alpha weight_decay betas eps moments_dtype clip_norm on_spike spike_deviations recompute recompute_method "
        "recompute_num_layers hang_timeout "
        "activation_offload activation_offload_dir activation_offload_window_mib router_aux_coef "
        "router_bias_update_rate hang_timeout seed",
        "eval": "every pairs at_start best_metric best_direction patience min_improvement",
        "checkpoint": "every at_end before_deadline keep resume changed_inputs verify asynchronous on_failed_write",
        "logging": "every tensorboard report model_card trackers project run_name tags directory offline peak_tflops "
        "profile_steps profile_ranks",
        "hub": "push private revision",
    }
    keys = {section: set(names.split()) for section, names in contract.items()}
    plain = load_config({}).to_dict()
    assert plain.pop("output_dir") == ""
    assert {section: set(values) for section, values in plain.items()} == keys


def test_yaml_overrides_and_defaults_come_together(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "model: {path: m}\ntrain:\n  learning_rate: 5e-7\n  steps: 10\ndata:\n")
    config = load_config(path, ["train.steps=20", "parallel.tensor=2", "data.columns.chosen=better"])
    assert (config.train.learning_rate, config.train.steps, config.parallel.tensor) == (5e-7, 20, 2)
    assert config.data.columns == {"chosen": "better"}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-6", 1e-6),
        ("train.learning_rate=1", 1.0),
        ("train.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("train.epochs=null", None),
        ("data.max_length=null", None),
        ("data.shuffle=false", False),
        ("data.train=a.jsonl", "a.jsonl"),
        ("data.train=[a, {path: b, weight: 2}]", ["a", {"path": "b", "weight": 2.0}]),
        ("output_dir=2024", "2024"),
        ("output_dir=2024-01-01", "2024-01-01"),
        ("output_dir=a=b", "a=b"),
        ("checkpoint.resume=007", "007"),
        ("data.columns={prompt: question}", {"prompt": "question"}),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(override: str, value: object) -> None:
    config = load_config({}, [override])
    at: object = config
    for part in override.partition("=")[0].split("."):
        at = getattr(at, part)
    assert at == value and type(at) is type(value)


NUMBERS: list[tuple[str, str, object]] = [
    ("train.learning_rate", "5e-7", 5e-7),
    ("train.learning_rate", "1E-6", 1e-6),
    ("train.learning_rate", "'5e-7'", 5e-7),
    ("train.learning_rate", ".5", 0.5),
    ("train.steps", "010", 10),
    ("train.steps", "0x1F", 31),
    ("train.steps", "0o17", 15),
    ("train.steps", "8_192", 8192),
    ("data.shuffle", "no", False),
    ("data.shuffle", "Off", False),
    ("data.shuffle", "yes", True),
    ("data.shuffle", "TRUE", True),
    ("data.eval", "", None),
    ("output_dir", "2024-01-01", "2024-01-01"),
    ("output_dir", "1:30", "1:30"),
    ("output_dir", "'010'", "010"),
]


@pytest.mark.parametrize(("key", "text", "value"), NUMBERS)
def test_yaml_means_what_a_reader_thinks_in_a_file_and_on_the_command_line(
    key: str, text: str, value: object, tmp_path: Path
) -> None:
    section, _, name = key.partition(".")
    written = f"{section}: {{{name}: {text}}}\n" if name else f"{section}: {text}\n"
    for config in (load_config(write(tmp_path / "run.yaml", written)), load_config({}, [f"{key}={text}"])):
        found = getattr(getattr(config, section), name) if name else getattr(config, section)
        is_command_line_text = key == "output_dir" and text.startswith("'")
        assert (found == value and type(found) is type(value)) or is_command_line_text
        again = load_config(write(tmp_path / "config.yaml", config.to_yaml()))
        assert again == load_config(write(tmp_path / "config.yaml", again.to_yaml()))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps=1:30", "train.steps must be a whole number or null, got the text '1:30'"),
        ("train.steps=many", "train.steps must be a whole number or null, got the text 'many'"),
        ("train.steps=2.0", "train.steps must be a whole number or null, got the number 2.0"),
        ("train.steps=no", "train.steps must be a whole number or null, got the text 'no'"),
        ("train.learning_rate=.nan", "train.learning_rate must be at least 0, got nan"),
        ("train.router_aux_coef=.nan", "train.router_aux_coef must be at least 0, got nan"),
        ("objective.rpo_eta=.nan", "objective.rpo_eta must be greater than 0, got nan"),
        ("objective.simpo_gamma=.nan", "objective.simpo_gamma is nan, which is no number"),
        ("train.learning_rate=nan", "train.learning_rate must be a number, got the text 'nan'"),
        ("train.learning_rate=fast", "train.learning_rate must be a number, got the text 'fast'"),
        ("train.learning_rate=1:30", "train.learning_rate must be a number, got the text '1:30'"),
        ("data.shuffle=maybe", "data.shuffle must be true or false, got the text 'maybe'"),
        ("train.recompute=off", "train.recompute: 'off' is not known; choose one of: auto, none, small, selective, full"),
        ("checkpoint.resume=no", "checkpoint.resume is 'no', which is no text here; use auto, never or the path of a step"),
        ("data.eval=off", "data.eval is 'off', which is no text here; use null for nothing (a path of that name: ./off)"),
        ("reference.path=No", "reference.path is 'No', which is no text here; use null for nothing"),
        (f"train.steps={'9' * 5000}", "train.steps is no usable value: a whole number has 5,000 digits"),
        (f"data.train={'[' * 3000}", "data.train is no usable value: lists and mappings are nested too deeply"),
    ],
)
def test_what_is_no_number_or_word_of_an_option_is_refused_in_a_file_and_on_the_command_line(
    override: str, sentence: str, tmp_path: Path
) -> None:
    assert sentence in error_of({}, override)
    key, _, text = override.partition("=")
    section, _, name = key.partition(".")
    path = write(tmp_path / "run.yaml", f"{section}:\n  {name}: {text}\n")
    said = error_of(path)
    assert sentence.partition(" is no usable value: ")[2] in said and (sentence in said or "usable" in sentence)


def test_aliases_are_written_out_up_to_a_bound(tmp_path: Path) -> None:
    levels = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 9))
    assert "it has more than 10,000 values, aliases written out" in error_of(
        write(tmp_path / "bomb.yaml", f"x0: &x0 [a, a]\n{levels}")
    )
    for tagged in ("!!timestamp x", "!!timestamp", "!!int x", "!!bool x"):
        assert "bad.yaml" in error_of(write(tmp_path / "bad.yaml", f"train: {{steps: {tagged}}}\n"))
    assert "a list or mapping contains itself" in error_of(write(tmp_path / "self.yaml", "data: &a {train: [*a]}\n"))
    merged = "train: &t {steps: 3, seed: 1}\neval: {every: 0}\n"
    assert load_config(write(tmp_path / "merged.yaml", merged)).train.steps == 3
    inherited = load_config(write(tmp_path / "in.yaml", "train: {<<: {steps: 3, seed: 1}, seed: 2}\n")).train
    assert (inherited.steps, inherited.seed) == (3, 2)


@pytest.mark.parametrize(
    "text", ["1e-6", "0o17", "no", "010", "0x1F", "1:30", "8_192", "5.", "=", "null", "~", "", "2024-01-01"]
)
def test_a_text_that_looks_like_something_else_is_written_so_that_both_versions_of_yaml_read_it(text: str) -> None:
    from megadpo.config import yaml_core

    written = yaml_core.dump({"a": text})
    assert yaml_core.parse(written) == yaml.safe_load(written) == {"a": text}


def test_home_and_variables_in_paths_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    config = load_config({}, ["model.path=~/model", "output_dir=$RUNS/first", "reference.path=${RUNS}/first/hf"])
    assert (config.model.path, config.output_dir, config.reference.path) == (
        "/home/me/model",
        "/runs/first",
        "/runs/first/hf",
    )
    assert "output_dir: $NOWHERE/a names $NOWHERE, which is not set here" in error_of({}, "output_dir=$NOWHERE/a")


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("optim.beta", "objective.beta"),
        ("trian.steps", "train.steps"),
        ("data.shufle", "data.shuffle"),
        ("parallel.tensor_parallel", "parallel.tensor"),
        ("data.max_length.x", "data.max_length"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(key: str, suggestion: str) -> None:
    assert f"unknown key {key}; did you mean {suggestion}?" in error_of({}, f"{key}=1")


def misspellings(key: str) -> list[str]:
    """A key with a letter left out, two letters exchanged, and one put in, at every place in it."""
    drawn = random.Random(key)
    letters = [drawn.choice(string.ascii_lowercase) for _ in key]
    found = [key[:n] + key[n + 1 :] for n in range(len(key))]
    found += [key[:n] + key[n + 1] + key[n] + key[n + 2 :] for n in range(len(key) - 1)]
    found += [key[:n] + letter + key[n:] for n, letter in enumerate(letters)]
    return sorted({word for word in found if word and word == word.strip(".") and word not in KEYS})


# Whoever types the last part of another key exactly is asked for that one.
NAMESAKES = {"mode": "reference.mode", "train.beta": "objective.beta"}
KEYS = all_keys(Config)


def is_one_slip(word: str, key: str) -> bool:
    """Whether `key` becomes `word` by a letter left out, two letters exchanged, or any letter put in."""
    left_out = any(key[:n] + key[n + 1 :] == word for n in range(len(key)))
    exchanged = any(key[:n] + key[n + 1] + key[n] + key[n + 2 :] == word for n in range(len(key) - 1))
    return left_out or exchanged or any(word[:n] + word[n + 1 :] == key for n in range(len(word)))


def ask_for_misspelt(words: Iterable[tuple[str, str]]) -> None:
    for word, key in words:
        said = error_of({}, f"{word}=1")
        answer = said.rpartition("did you mean ")[2].removesuffix("?")
        # `learning_ratse` is one slip away from learning_rate and from learning_rates.
        is_right = answer == NAMESAKES.get(word, key) or (word not in NAMESAKES and is_one_slip(word, answer))
        assert answer in KEYS and is_right and f"unknown key {word}; did you mean" in said, (key, said)


def test_a_misspelt_key_is_answered_with_the_right_one() -> None:
    drawn = random.Random(0)
    ask_for_misspelt((word, key) for key in KEYS for word in drawn.sample(misspellings(key), 2))


@pytest.mark.exhaustive
def test_every_misspelling_of_every_key_is_answered_with_the_right_one() -> None:
    words = [(word, key) for key in KEYS for word in misspellings(key)]
    assert len(words) > 40 * len(KEYS)
    ask_for_misspelt(words)


def test_an_unknown_key_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "model:\n  path: m\ntrain:\n  lerning_rate: 1\n")
    assert error_of(path) == f"{path}, line 4: unknown key train.lerning_rate; did you mean train.learning_rate?"


def test_a_key_unlike_any_other_gets_no_suggestion() -> None:
    assert error_of({"zzz": 1}) == "unknown key zzz"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train": {"steps": True}}, "train.steps must be a whole number or null, got true"),
        ({"train": {"steps": 1.5}}, "train.steps must be a whole number or null, got the number 1.5"),
        ({"train": {"steps": "ten"}}, "train.steps must be a whole number or null, got the text 'ten'"),
        ({"data": {"shuffle": 1}}, "data.shuffle must be true or false, got the number 1"),
        ({"train": {"learning_rate": True}}, "train.learning_rate must be a number, got true"),
        ({"train": {"betas": [0.9]}}, "train.betas must be a list of 2 numbers, got the list [0.9]"),
        ({"train": {"seed": None}}, "train.seed must be a whole number, got null"),
        ({"model": {"path": 3}}, "model.path must be text, got the number 3"),
        ({"model": "gpt2"}, "model is a section of options, got the text 'gpt2'"),
        ({"data": {"columns": {"a": 1}}}, "data.columns must be a mapping from text to text"),
        ({"output_dir": datetime.date(2024, 1, 1)}, "put it in quotes"),
    ],
)
def test_a_wrong_type_is_named_with_path_value_and_expected_type(values: dict[str, object], sentence: str) -> None:
    assert sentence in error_of(values)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: train.steps is given twice"),
        ("train: [1\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "expected a mapping of sections"),
        ("a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("train:\n\tsteps: 1\n", "line 2: not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path / "run.yaml", text)
    assert sentence in error_of(path) and str(path) in error_of(path)


def test_a_missing_file_and_invalid_utf8_are_named(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"output_dir: \xff\n")
    assert "cannot be read" in error_of(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.steps=10", "train.epochs=1"], "train.steps (10) and train.epochs (1) are both given"),
        (["train.steps=0"], "train.steps must be at least 1, got 0"),
        (["objective.beta=0"], "objective.beta must be greater than 0"),
        (["objective.beta=.nan"], "objective.beta must be greater than 0"),
        (["train.learning_rate=.inf"], "train.learning_rate must be at least 0, got inf"),
        (["objective.label_smoothing=0.5"], "must be in [0, 0.5)"),
        (["train.betas=[0.9,1.0]"], "must both be in [0, 1)"),
        (["train.min_learning_rate=1"], "is above learning_rate"),
        (["train.schedule=constant", "train.min_learning_rate=1e-7"], "has no effect with train.schedule constant"),
        (["train.steps=5", "train.warmup_steps=6"], "is more than train.steps"),
        (["train.warmup_steps=6", "train.warmup_ratio=0.1"], "are both given; set the one to 0"),
        (["train.warmup_ratio=3"], "train.warmup_ratio must be in [0, 1], got 3.0"),
        (["train.schedule_power=2"], "train.schedule_power is read by train.schedule polynomial, but that is cosine"),
        (["train.schedule=wsd", "train.decay_ratio=1.5"], "train.decay_ratio is a share of the run's steps, in (0, 1]"),
        (["train.schedule=wsd", "train.decay_ratio=0.6", "train.warmup_ratio=0.5"], "are more than the whole run"),
        (["parallel.sequence=true"], "needs parallel.tensor > 1"),
        (["reference.tokens_per_micro_batch=9"], "only for reference.mode precomputed"),
        (["eval.every=5"], "eval.every is set, but there is nothing to evaluate on"),
        (["train.schedule=cosin"], "inverse_sqrt, wsd (did you mean 'cosine'?)"),
        (["schedule.name=zero_bubble"], "(schedule.zero_bubble is an option of its own, true or false)"),
        (["data.train=[]"], "data.train is an empty list"),
        (["data.train=[{weight: 1}]"], "data.train[0] has no path"),
        (
            ["data.train=[a, {path: b, wieght: 1}]"],
            "unknown key data.train[1].wieght; did you mean data.train[1].weight?",
        ),
        (["data.train=[{path: b, weight: 0}]"], "data.train[0].weight must be greater than 0"),
        (["data.eval=[3]"], "data.eval[0] must be text"),
        (["train.steps"], "is not of the form key=value"),
    ],
)
def test_ranges_and_contradictions_are_refused(overrides: list[str], sentence: str) -> None:
    assert sentence in error_of({}, *overrides)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.context_method=ring",
        "adapter.kind=qlora",
        "adapter.init=loftq",
    ],
)
def test_what_this_version_does_not_have_is_refused_and_not_ignored(override: str) -> None:
    message = error_of({}, override)
    assert override.partition("=")[0] in message
    assert re.search(r"this version of megadpo|is not known", message)


@pytest.mark.parametrize("key", ["model.dtype", "train.moments_dtype", "parallel.gradient_dtype"])
@pytest.mark.parametrize(
    ("spelling", "choice"),
    [("float32", "fp32"), ("torch.float32", "fp32"), ("bfloat16", "bf16"), ("torch.bfloat16", "bf16"), ("bf16", "bf16")],
)
def test_dtypes_are_read_as_torch_spells_them_and_written_as_fp32_and_bf16(key: str, spelling: str, choice: str) -> None:
    config, (section, name) = load_config({}, [f"{key}={spelling}"]), key.split(".")
    assert getattr(getattr(config, section), name) == choice
    assert yaml.safe_load(config.to_yaml())[section][name] == choice


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("fp16", "model.dtype: 'fp16' is not available in this version of megadpo; use bf16"),
        ("float16", "model.dtype: 'float16' is not available in this version of megadpo; use bf16"),
        ("torch.half", "model.dtype: 'torch.half' is not available in this version of megadpo; use bf16"),
        ("bfloat_16", "model.dtype: 'bfloat_16' is not known; choose one of: auto, fp32, bf16 (did you mean 'bf16'?)"),
        ("FP32", "model.dtype: 'FP32' is not known; choose one of: auto, fp32, bf16 (did you mean 'fp32'?)"),
    ],
)
def test_a_dtype_that_is_not_there_is_refused_with_the_one_to_use(value: str, sentence: str) -> None:
    assert error_of({}, f"model.dtype={value}") == sentence


def test_training_names_the_first_option_that_is_missing() -> None:
    with pytest.raises(UserError, match=r"model\.path is required"):
        load_config({}).require_for_training()
    with pytest.raises(UserError, match="output_dir is required"):
        load_config({"model": {"path": "m"}, "data": {"train": "t"}}).require_for_training()
    load_config({"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "o"}).require_for_training()


def test_the_resolved_yaml_loads_to_the_same_resolved_configuration(tmp_path: Path) -> None:
    overrides = [
        "model.path=m",
        "parallel.tensor=2",
        "reference.mode=precomputed",
        "data.train=[a,{path: b, weight: 2}]",
    ]
    config = load_config({}, overrides)
    again = load_config(write(tmp_path / "config.yaml", config.to_yaml()))
    assert again == config.resolved() == again.resolved()
    assert again.parallel.sequence is True and again.reference.path == "m" and again.train.epochs == 1.0
    assert config.parallel.sequence is None, "resolving leaves the original alone"


def test_paths_that_are_here_are_read_back_as_they_were_whatever_they_look_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_KEY", "preferences")
    model = tmp_path / "preferences" / "sk-1234567890abcdefghijklmn"
    model.mkdir(parents=True)
    (model / "rows.jsonl").touch()
    given = {"model": {"path": str(model)}, "data": {"train": [{"path": f"{model}/rows.jsonl"}]}}
    config = load_config(given | {"logging": {"run_name": "preferences"}})
    again = load_config(write(tmp_path / "config.yaml", config.to_yaml()))
    assert (again.model.path, again.data.train) == (str(model), [{"path": f"{model}/rows.jsonl"}])
    assert again.logging.run_name == "***"


def test_a_run_is_the_same_whatever_was_hidden_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(train: str, model: str = "models/preferences") -> Config:
        return load_config({"model": {"path": model}, "data": {"train": train}, "output_dir": str(tmp_path)})

    ours = of("https://me:password1@host/preferences/rows.jsonl")
    plain = yaml.safe_dump(ours.resolved().to_dict())  # as versions that hid nothing wrote it
    for written in (plain, plain.replace("preferences", "***"), ours.to_yaml()):
        write(tmp_path / "config.yaml", written)
        for value in (None, "preferences"):
            monkeypatch.setenv("S3_KEY", value) if value else monkeypatch.delenv("S3_KEY", raising=False)
            claim_output_dir(tmp_path, ours)
            claim_output_dir(tmp_path, of("https://me:password2@host/preferences/rows.jsonl"))
    for other in (of("https://me:password1@host/preferences/more.jsonl"), of(ours.data.train, "others/preferences")):
        with pytest.raises(UserError, match="holds a different run"):
            claim_output_dir(tmp_path, other)


def test_datasets_from_python_are_kept_as_they_are_and_written_as_a_summary() -> None:
    rows = Dataset.from_dict({"chosen": ["a", "b"], "rejected": ["c", "d"]})
    config = load_config({"data": {"train": rows, "eval": [rows, "more.jsonl"]}}, ["train.steps=3"])
    assert config.data.train is rows and config.data.eval[0] is rows
    assert load_config(config).data.train is rows and config.resolved().data.train is rows
    summary = yaml.safe_load(config.to_yaml())["data"]["train"]
    assert summary.startswith("<datasets.Dataset, 2 rows, fingerprint ")


def test_a_config_changed_by_hand_is_checked_again() -> None:
    config = Config()
    config.train.steps = "many"  # type: ignore[assignment]
    assert "train.steps must be a whole number" in error_of(config)
    config = Config()
    config.train.pairs_per_step = 0
    with pytest.raises(UserError, match=r"train\.pairs_per_step must be at least 1"):
        validate(config)


def test_loading_changes_neither_the_dict_nor_the_config_given() -> None:
    given_dict = {"train": {"steps": 1}}
    first = load_config(given_dict, ["train.steps=2"])
    second = load_config(first, ["train.steps=3"])
    assert (given_dict["train"]["steps"], first.train.steps, second.train.steps) == (1, 2, 3)


def test_paths_and_tuples_from_python_are_accepted() -> None:
    config = load_config({"model": {"path": Path("m")}, "train": {"betas": (0.8, 0.9)}, "data": {"train": Path("x")}})
    assert (config.model.path, config.train.betas, config.data.train) == ("m", (0.8, 0.9), "x")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from([*strict.all_keys(Config), "nonsense"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2),
        max_size=3,
    )
)
def test_any_values_whatever_give_a_configuration_or_one_user_error(values: dict[str, object]) -> None:
    nested: dict[str, object] = {}
    for dotted, value in values.items():
        section, _, name = dotted.partition(".")
        if name and isinstance(nested.setdefault(section, {}), dict):
            nested[section][name] = value  # type: ignore[index]
        elif not name:
            nested[section] = value
    try:
        config = load_config(nested)
    except UserError:
        return
    assert yaml.safe_load(config.to_yaml())["train"] == config.resolved().to_dict()["train"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_configurations_load_and_are_complete(path: Path) -> None:
    load_config(path).require_for_training()


def test_every_field_has_a_docstring_and_the_documentation_is_made_from_it() -> None:
    from tools.config_table import render

    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert render() in written, "run: python -m tools.config_table --write"
    for section in dataclasses.fields(Config):
        assert section.name in written


@pytest.mark.parametrize(
    ("text", "override", "steps_and_epochs"),
    [
        ("epochs: 2", "train.steps=5", (5, None)),
        ("steps: 5", "train.epochs=0.5", (None, 0.5)),
        ("epochs: 2", "train.steps=null", (None, 2.0)),
        ("steps: 5", "train.seed=1", (5, None)),
    ],
)
def test_a_length_on_the_command_line_displaces_the_file_s(
    tmp_path: Path, text: str, override: str, steps_and_epochs: tuple[int | None, float | None]
) -> None:
    train = load_config(write(tmp_path / "run.yaml", f"train:\n  {text}\n"), [override]).train
    assert (train.steps, train.epochs) == steps_and_epochs


def test_a_file_with_two_lengths_is_still_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "train:\n  steps: 5\n  epochs: 1\n")
    assert "are both given" in error_of(path)
