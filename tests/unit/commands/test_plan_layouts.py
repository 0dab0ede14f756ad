"""`megadpo plan --layouts` lists what would run, says why the rest would not, and starts nothing."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch.distributed as dist

from megadpo import cli
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.commands.plan_layouts import layouts, list_layouts, most_parameters
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.parallel.layout import choose_layout
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config
from tests.helpers.models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, four heads, two key-value heads."""
    return save_model(tmp_path_factory.mktemp("plan") / "model", tokenizer=False, num_hidden_layers=6)


def configured(model: Path, **parallel: object) -> Config:
    return load_config({"model": {"path": str(model)}, "train": {"pairs_per_step": 8}, "parallel": parallel})


def test_every_layout_listed_would_be_let_through_and_they_are_all(model: Path) -> None:
    config, shape = configured(model), shape_of(read_hf_config(model))
    fits, refused = layouts(config, shape, None, 8)
    listed = {
        context: {
            (fit.layout.tensor, fit.layout.pipeline, fit.layout.virtual, fit.layout.data)
            for fit in fits
            if fit.layout.context == context
        }
        for context in (1, 4, 8)
    }
    assert listed[1] == {
        *((1, 1, 1, 8), (1, 2, 1, 4), (1, 2, 3, 4), (1, 4, 1, 2)),
        *((2, 1, 1, 4), (2, 2, 1, 2), (2, 2, 3, 2), (2, 4, 1, 1)),
    }
    assert listed[4] == {(1, 1, 1, 2), (1, 2, 1, 1), (1, 2, 3, 1), (2, 1, 1, 1)} and listed[8] == {(1, 1, 1, 1)}
    for fit in fits:
        sizes = load_config(config, [f"parallel.{name}={size}" for name, size in fit.sizes.items()])
        check_layout(choose_layout(sizes.parallel, 8), shape, 8)
    # Tensor 4 with pipeline 1, 2 and 2 x 3 and with context 2, tensor 8, pipeline 8.
    assert sum(refused.values()) == 6
    assert any("tensor 4 does not divide the model's 2 key-value heads" in reason for reason in refused)
    assert any("pipeline 8 is more than the model's 6 layers" in reason for reason in refused)


def test_a_single_process_has_one_layout_with_all_parameters(model: Path) -> None:
    source = open_hf(model)
    total = sum(prod(source.shape(name)) for name in source.names())
    fits, refused = layouts(configured(model), shape_of(read_hf_config(model)), None, 1)
    assert [fit.parameters for fit in fits] == [total] and not refused


def test_the_parameters_are_those_of_the_process_that_has_most(model: Path) -> None:
    shape = shape_of(read_hf_config(model))
    even = choose_layout(configured(model, pipeline=2).parallel, 2)
    heavy_end = choose_layout(configured(model, pipeline=2, pipeline_layout=[1, 5]).parallel, 2)
    assert (
        most_parameters(heavy_end, shape)
        > most_parameters(even, shape)
        > most_parameters(choose_layout(configured(model, tensor=2, pipeline=2).parallel, 4), shape)
    )


def test_stages_that_the_configuration_cuts_itself_are_kept_where_they_fit(model: Path) -> None:
    page = list_layouts(configured(model, pipeline=2, virtual_pipeline=2, pipeline_layout="1,2,2,1"), [2])
    assert "1+2 2+1" in page and "3 x 2" in page


def test_too_few_pairs_for_the_replicas_is_a_reason_told_once(model: Path) -> None:
    page = list_layouts(load_config(configured(model), ["train.pairs_per_step=2"]), [8])
    assert page.count("is less than the 4 data-parallel replicas") == 1 and page.count("is less than the 8") == 1


def test_a_reference_that_does_not_fit_rules_a_layout_out_too(model: Path, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", tokenizer=False, num_hidden_layers=1)
    page = list_layouts(load_config(configured(model), [f"reference.path={small}"]), [2])
    assert "2 processes: 3 layouts" in page and page.count("more than the model's 1 layers") == 2


def test_the_command_prints_a_table_for_each_number_and_joins_no_processes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{path: {model}}}\n")
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "train.pairs_per_step=4", "--layouts", "2", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 processes: 5 layouts\n") and "\n\n4 processes: " in printed
    assert printed.splitlines()[1].split()[:4] == ["tensor", "context", "pipeline", "virtual_pipeline"]
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--layouts", "train.pairs_per_step=4"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "process" in line[:12]] == list("1248")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("path", "counts", "message"),
    [("nowhere", [2], "model.path: there is no directory 'nowhere'"), (None, [0], "must be at least 1, got 0")],
)
def test_what_cannot_be_planned_is_one_sentence(model: Path, path: str | None, counts: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_layouts(configured(Path(path) if path else model), counts)
