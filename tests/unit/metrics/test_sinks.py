"""metrics.jsonl never loses a line it should keep; TensorBoard and progress show what was written."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megadpo.config.schema import LoggingConfig
from megadpo.metrics.progress import MOST_PLAIN_LINES, ProgressSink, describe
from megadpo.metrics.sinks import JsonlSink, TensorBoardSink, open_sinks


def strict_lines(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"step": 1, "loss": 0.5, "rewards/margins": 0.0})
    assert strict_lines(path) == [{"step": 1, "loss": 0.5, "rewards/margins": 0.0}]
    sink.close()


def test_values_that_json_has_no_word_for_become_null_and_are_spelled_out(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "logps/chosen": -math.inf, "learning_rate": 0.1})
    sink.close()
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert line == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "logps/chosen": None,
        "learning_rate": 0.1,
        "non_finite": {"loss": "nan", "grad_norm": "inf", "logps/chosen": "-inf"},
    }


def test_a_resumed_run_drops_later_steps_and_keeps_the_others_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    earlier = b'{"step": 1,   "loss": 0.70}\n{"step": 2, "loss": 0.6}\n{"step": 2, "eval_loss": 0.65}\n'
    path.write_bytes(earlier + b'{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    sink = JsonlSink(path, resume_step=2)
    sink.write({"step": 3, "loss": 0.55})
    sink.close()
    assert path.read_bytes() == earlier + b'{"step": 3, "loss": 0.55}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_last_line_without_its_end_is_kept_and_not_run_into_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.7}')
    sink = JsonlSink(path, resume_step=1)
    sink.write({"step": 2, "loss": 0.6})
    sink.close()
    assert [line["step"] for line in strict_lines(path)] == [1, 2]


def test_resuming_without_a_file_begins_one(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", resume_step=7)
    sink.write({"step": 8, "loss": 0.1})
    sink.close()
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [8]


def test_a_new_run_keeps_older_files_under_another_name(tmp_path: Path) -> None:
    for loss in (0.1, 0.2, 0.3):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write({"step": 1, "loss": loss})
        sink.close()
    JsonlSink(tmp_path / "empty.jsonl").close()
    JsonlSink(tmp_path / "empty.jsonl").close()
    assert not (tmp_path / "empty.1.jsonl").exists(), "nothing of what never had a line"
    (tmp_path / "empty.jsonl").unlink()
    losses = {path.name: strict_lines(path)[0]["loss"] for path in tmp_path.iterdir()}
    assert losses == {"metrics.1.jsonl": 0.1, "metrics.2.jsonl": 0.2, "metrics.jsonl": 0.3}


def test_tensorboard_reads_back_the_scalars_and_hides_steps_done_again(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step, loss in ((1, 0.7), (2, 0.6), (3, 0.5)):
        first.write({"step": step, "loss": loss, "rewards/margins": 0.0})
    first.close()
    resumed = TensorBoardSink(tmp_path, resume_step=1)
    resumed.write({"step": 2, "loss": 0.65})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "rewards/margins"]
    shown = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert shown == [(1, 0.7), (2, 0.65)]


WITHOUT_TENSORBOARD = """
import sys
sys.modules["tensorboard"] = None  # as if it were not installed
from pathlib import Path
from megadpo.config.schema import LoggingConfig
from megadpo.errors import UserError
from megadpo.metrics.sinks import open_sinks

output_dir = Path(sys.argv[1])
try:
    open_sinks(output_dir, LoggingConfig(tensorboard=True), 10)
except UserError as error:
    assert "logging.tensorboard=false" in str(error), error
    assert not output_dir.exists()
    assert len(open_sinks(output_dir, LoggingConfig(tensorboard=False), 10)) == 2
    print("refused in a sentence")
"""


@pytest.mark.slow
def test_missing_tensorboard_is_said_in_a_sentence_and_matters_only_when_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TENSORBOARD, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "refused in a sentence\n", done.stderr


def test_a_run_has_all_sinks_it_asks_for(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path / "run", LoggingConfig(tensorboard=True), total_steps=2)
    for sink in sinks:
        sink.write({"step": 1, "loss": 0.5, "num_tokens": 12})
        sink.close()
    assert strict_lines(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "num_tokens": 12}]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("keeps_records", [True, False])
def test_what_was_written_up_to_a_resumed_step_is_kept_or_set_aside(tmp_path: Path, keeps_records: bool) -> None:
    for record, resume_step in (({"step": 1, "loss": 0.5}, None), ({"step": 2, "loss": 0.25}, 1)):
        for sink in open_sinks(tmp_path, LoggingConfig(tensorboard=True), 2, resume_step, keeps_records=keeps_records):
            sink.write(record)
            sink.close()
    steps = [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")]
    assert steps == ([1, 2] if keeps_records else [2])
    assert (tmp_path / "metrics.1.jsonl").exists() == (tmp_path / "tensorboard.1").exists() == (not keeps_records)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


RECORD = {"loss": 0.6931, "rewards/margins": 0.5, "rewards/accuracies": 0.75, "tokens_per_second": 1234.4}


def test_where_nobody_watches_progress_is_a_line_with_the_time_left() -> None:
    stream, now = io.StringIO(), [100.0]
    sink = ProgressSink(10, resume_step=4, stream=stream, clock=lambda: now[0])
    now[0] += 60
    sink.write({"step": 5, **RECORD})
    sink.close()
    words = "loss 0.6931, margin 0.500, accuracy 0.75, 1234 tokens/s, ETA 0:05:00"
    assert stream.getvalue() == f"step 5/10: {words}\n"


def test_plain_lines_stay_few_in_a_long_run_and_the_last_step_is_among_them() -> None:
    stream = io.StringIO()
    sink = ProgressSink(9_999, stream=stream)
    for step in range(1, 10_000):
        sink.write({"step": step, **RECORD})
    lines = stream.getvalue().splitlines()
    assert len(lines) <= MOST_PLAIN_LINES + 2
    assert lines[0].startswith("step 1/9999:") and lines[-1].startswith("step 9999/9999:")


def test_evaluations_are_always_shown() -> None:
    stream = io.StringIO()
    sink = ProgressSink(1_000, stream=stream)
    sink.write({"step": 1, **RECORD})
    sink.write({"step": 2, "eval_loss": 0.25, "eval_rewards/accuracies": 1.0})
    assert stream.getvalue().splitlines()[-1] == "step 2: held-out loss 0.2500, accuracy 1.00"


def test_on_a_terminal_progress_is_a_bar_that_counts_from_the_resumed_step() -> None:
    stream = Terminal()
    sink = ProgressSink(10, resume_step=4, stream=stream)
    sink.write({"step": 5, **RECORD})
    sink.write({"step": 10, **RECORD})
    sink.close()
    shown = stream.getvalue()
    assert "4/10" in shown and "10/10" in shown
    assert "loss 0.6931  margin 0.500  accuracy 0.75  1234 tokens/s" in shown


def test_a_margin_that_a_step_does_not_have_is_left_out_and_a_loss_that_is_no_number_is_not() -> None:
    assert describe({"loss": 0.5, "rewards/margins": math.nan}) == "loss 0.5000"
    assert describe({"loss": math.nan, "rewards/margins": math.nan}) == "loss nan"


def test_every_held_out_set_has_a_line_of_its_own() -> None:
    stream = io.StringIO()
    sink = ProgressSink(1_000, stream=stream, held_out=["helpful", "b.2"])
    sink.write({"step": 0, "eval_helpful_loss": 0.25, "eval_helpful_rewards/margins": 0.5, "eval_b.2_loss": 0.125})
    assert stream.getvalue().splitlines() == [
        *["step 0: held-out helpful: loss 0.2500, margin 0.500", "step 0: held-out b.2: loss 0.1250"]
    ]
