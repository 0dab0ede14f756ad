"""Options of activation memory: what is without effect or cannot be is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.schema import TrainConfig
from megadpo.errors import UserError
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from megadpo.validation.load import load_config
from megadpo.validation.memory import check_memory_machine, check_recompute_layers


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recompute_method=block"], "train.recompute_method is block, which has no effect with train.recompute auto"),
        (["recompute=selective", "recompute_num_layers=2"], "no effect with train.recompute selective; set that to full"),
        (["recompute=small", "recompute_method=block"], "no effect with train.recompute small; set that to full"),
        (["recompute=norms"], "'norms' is not known; choose one of: auto, none, small, selective, full"),
        (["recompute=full", "recompute_method=block"], "say in train.recompute_num_layers how many layers are recomputed"),
        (["activation_offload=disk"], "disk needs a directory"),
        (["activation_offload_dir=x"], "nothing else reads one"),
        (["activation_offload=cpu", "activation_offload_dir=x"], "nothing else reads one"),
        (["activation_offload_window_mib=9"], "no effect with train.activation_offload none"),
        (["activation_offload=nvme"], "'nvme' is not known; choose one of: none, cpu, disk"),
    ],
)
def test_an_option_without_effect_is_refused(overrides, sentence):
    with pytest.raises(UserError) as caught:
        load_config({}, [f"train.{override}" for override in overrides])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_zero_stage_3_does_not_offload_activations():
    zero_3 = ["parallel.engine=deepspeed", "parallel.zero_stage=3"]
    offload = ["train.activation_offload=disk", "train.activation_offload_dir=x"]
    with pytest.raises(UserError, match="ZeRO stage 3 frees and gathers parameters"):
        load_config({}, zero_3 + offload)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a place to move to")
def test_moving_to_host_memory_makes_no_sense_where_activations_are_there_already():
    with pytest.raises(UserError, match="no CUDA device here and activations are in host memory already; use disk or none"):
        check_memory_machine(load_config({}, ["train.activation_offload=cpu"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a place to move to")
def test_so_does_moving_the_optimizer_s_state():
    with pytest.raises(UserError, match="no CUDA device here and the optimizer's state is in host memory already; use none"):
        check_memory_machine(load_config({}, ["parallel.offload=cpu"]))


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_deepspeed_is_told_of_overlap_in_its_own_file(overlap):
    with pytest.raises(UserError, match=f"^parallel.overlap is {overlap}, but parallel.engine is deepspeed; set zero_opti"):
        load_config({}, ["parallel.engine=deepspeed", f"parallel.overlap={overlap}"])


@pytest.mark.parametrize("fusion", ["true", "false"])
def test_deepspeed_has_no_sum_that_a_product_could_add_to(fusion):
    with pytest.raises(
        UserError, match=rf"^parallel\.gradient_accumulation_fusion is {fusion}, but parallel\.engine is deepspeed"
    ):
        load_config({}, ["parallel.engine=deepspeed", f"parallel.gradient_accumulation_fusion={fusion}"])


def test_delayed_products_are_products_that_add_up():
    overrides = ["schedule={name: 1f1b, zero_bubble: true}", "parallel.pipeline=2"]
    with pytest.raises(UserError, match=r"^parallel\.gradient_accumulation_fusion is false, but schedule\.zero_bubble"):
        load_config({}, [*overrides, "parallel.gradient_accumulation_fusion=false"])


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    overrides = ["train.activation_offload=disk", f"train.activation_offload_dir={tmp_path}/file/x"]
    with pytest.raises(UserError, match=r"^train.activation_offload_dir: .*/file/x cannot be made: Not a directory"):
        check_memory_machine(load_config({}, overrides))


@pytest.mark.parametrize(
    ("method", "num_layers", "sentence"),
    [
        ("uniform", 4, "is 4, which does not divide the 3 layers"),
        ("uniform", 3, None),
        ("uniform", 1, None),
        ("block", 3, None),
        ("block", 4, "but no pipeline stage (or chunk of one) has more than 3 layers"),
    ],
)
def test_layers_to_recompute_fit_the_stages(method, num_layers, sentence):
    train = TrainConfig(recompute="full", recompute_method=method, recompute_num_layers=num_layers)
    if sentence is None:
        check_recompute_layers(train, Layout(pipeline=2), 6)
        return
    with pytest.raises(UserError) as caught:
        check_recompute_layers(train, Layout(pipeline=2), 6)
    assert sentence in str(caught.value)


def test_the_present_words_mean_what_they_meant_and_megatron_is_not_told_of_small():
    assert Activations("none").megatron_options() == Activations("small").megatron_options() == {}
    assert Activations("selective").megatron_options()["recompute_granularity"] == "selective"
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert Activations.of(TrainConfig(recompute="full")).megatron_options() == full


def test_by_default_cheap_operations_are_computed_again_where_that_costs_next_to_nothing():
    default = Activations.of(TrainConfig())
    assert default.settled(small_is_cheap=True) == Activations("small")
    assert default.settled(small_is_cheap=False) == Activations("none")
    for chosen in ("none", "small", "selective", "full"):
        given = Activations.of(TrainConfig(recompute=chosen))
        assert given.settled(small_is_cheap=True) == given.settled(small_is_cheap=False) == given
