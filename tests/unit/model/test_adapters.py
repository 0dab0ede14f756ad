"""Where adapters lie on each rank, how new ones begin, and what layouts and engines have none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadpo.config.schema import AdapterConfig, Config
from megadpo.errors import UserError
from megadpo.model.adapters import linear
from megadpo.model.adapters.decomposed import as_plain, decompose, plain_tensor
from megadpo.model.adapters.initial import NewAdapter
from megadpo.model.adapters.linear import LinearAdapter, Projection
from megadpo.model.adapters.products import ColumnParallel, Operands
from megadpo.model.adapters.shards import adapter_shards, is_adapters
from megadpo.model.adapters.spec import AdapterSpec, adapter_shapes, resolve
from megadpo.model.families import ExpertPlace, shape_of, shard_parameters
from megadpo.model.families.fill import fill_shard
from megadpo.model.layer_ranks import LayerRanks
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.validation.model import check_adapters, check_reference_adapter
from tests.helpers.families import config_of


class Drawn:
    """Any tensor, drawn, as `TensorSource`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {name: torch.randn(size) for name, size in shapes.items()}

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self.tensors[name].narrow(dim, start, length)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def shape_and_spec(family: str, **options: Any) -> tuple[ModelShape, AdapterSpec]:
    shape = shape_of(config_of(family))
    return shape, resolve(AdapterConfig(kind="lora", **options), shape)


@pytest.mark.parametrize("num_tensor", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
def test_adapters_of_all_tensor_ranks_join_to_pefts_tensors_bit_for_bit(family, num_tensor):
    _joins_bit_for_bit(*shape_and_spec(family, use_dora=True, rank=3), num_tensor)


@pytest.mark.parametrize("num_tensor", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_so_do_those_of_embedding_and_head(tied, num_tensor):
    shape = shape_of(config_of("llama", tie_word_embeddings=tied))
    assert shape.vocab_size % 2, "the ranks' parts differ"
    spec = resolve(AdapterConfig(kind="lora", target_modules=["embed_tokens", "lm_head"], rank=3), shape)
    _joins_bit_for_bit(shape, spec, num_tensor)


def _joins_bit_for_bit(shape: ModelShape, spec: AdapterSpec, num_tensor: int) -> None:
    shapes = adapter_shapes(shape, spec)
    source, joined = Drawn(shapes), {name: torch.full(size, math.nan) for name, size in shapes.items()}
    for rank in range(num_tensor):
        place = ExpertPlace(tensor=rank, num_tensor=num_tensor)
        sizes = {"tensor_rank": rank, "num_tensor": num_tensor, "layers": range(shape.num_layers), "expert_place": place}
        matrices = shard_parameters(shape, **sizes, has_embedding=True, has_head=True)
        for shard in adapter_shards(spec, matrices, rank, place):
            values = torch.full(shard.shape, math.nan)
            fill_shard(shard, source, values)
            assert not values.isnan().any(), shard.name
            assert is_adapters(shard), shard.name
            assert shard.is_primary == (rank == 0 or shard.partition_dim is not None), shard.name
            for piece in shard.pieces:
                place_of = joined[piece.logical_name].narrow(piece.dim, piece.logical_start, piece.length)
                place_of.copy_(values.narrow(piece.dim, piece.local_start, piece.length))
    for name, tensor in source.tensors.items():
        assert torch.equal(joined[name], tensor), name


def test_an_adapter_stands_beside_the_matrix_that_it_adapts():
    """Rows of a rank's B are the rows that it has of the matrix."""
    shape, spec = shape_and_spec("llama", target_modules=["k_proj"])
    sizes = {"num_tensor": 2, "layers": range(1), "has_embedding": False, "has_head": False}
    matrices = shard_parameters(shape, tensor_rank=1, **sizes)
    (own,) = [shard for shard in adapter_shards(spec, matrices, 1) if "lora_B" in shard.name]
    (qkv,) = [shard for shard in matrices if "linear_qkv" in shard.name]
    of_matrix = [piece for piece in qkv.pieces if ".k_proj." in piece.logical_name]
    assert [(p.logical_start, p.length) for p in own.pieces] == [(p.logical_start, p.length) for p in of_matrix]


@pytest.mark.parametrize(("init", "low", "high"), [("kaiming", 0.95, 1.0), ("gaussian", 2.0, 5.0)])
def test_a_new_adapter_is_drawn_by_seed_and_name(init, low, high):
    """A is uniform within 1 / sqrt(inputs), or normal with a deviation of 1 / rank; B is zero."""
    shape, spec = shape_and_spec("llama", init=init, rank=8)
    model = Drawn({})
    new, again, other = (NewAdapter(spec, shape, seed, model) for seed in (1, 1, 2))
    names = list(adapter_shapes(shape, spec))
    first, second = [name for name in names if name.endswith("q_proj.lora_A.weight")][:2]
    a = new.read(first, 0, 0, 8)
    assert torch.equal(a[2:5], again.read(first, 0, 2, 3))
    assert torch.equal(a[:, 1:4], again.read(first, 1, 1, 3))
    assert not torch.equal(a, new.read(second, 0, 0, 8)) and not torch.equal(a, other.read(first, 0, 0, 8))
    scale = a.shape[1] ** 0.5 if init == "kaiming" else 8
    assert low <= float(a.abs().max()) * scale <= high
    assert not new.read(first.replace("lora_A", "lora_B"), 0, 0, 4).any()


def test_a_new_embedding_s_adapter_begins_as_in_peft_and_the_head_s_as_any_other():
    """A is zero and B normal, whatever init is."""
    shape, spec = shape_and_spec("llama", init="gaussian", rank=8, target_modules=["embed_tokens", "lm_head"])
    new = NewAdapter(spec, shape, 1, Drawn({}))
    assert not new.read("model.embed_tokens.lora_embedding_A", 1, 3, 90).any()
    b = new.read("model.embed_tokens.lora_embedding_B", 0, 0, shape.hidden_size)
    assert float(b.std()) == pytest.approx(1, rel=0.1) and abs(float(b.mean())) < 0.1
    assert torch.equal(b[2:5], new.read("model.embed_tokens.lora_embedding_B", 0, 2, 3))
    assert float(new.read("lm_head.lora_A.weight", 0, 0, 8).std()) == pytest.approx(1 / 8, rel=0.2)
    assert not new.read("lm_head.lora_B.weight", 0, 0, 9).any()


def refusal(
    layout: Layout, family: str = "llama", changes: dict[str, Any] | None = None, tied: bool = False, **options: Any
) -> str:
    shape = shape_of(config_of(family, tie_word_embeddings=tied))
    spec = resolve(AdapterConfig(kind="lora", **options), shape)
    config = Config()
    for dotted, value in (changes or {}).items():
        section, name = dotted.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError) as error:
        check_adapters(config, shape, layout, spec)
    return str(error.value)


DEEPSPEED = {"parallel.engine": "deepspeed", "parallel.zero_stage": 3, "reference.mode": "adapter"}


@pytest.mark.parametrize(
    ("layout", "given", "says"),
    [
        (
            Layout(),
            {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
            "adapter.use_dora is true and lm_head has an adapter",
        ),
        (
            Layout(),
            {"target_modules": ["embed_tokens", "q_proj"], "init": "pissa"},
            "adapter.init is pissa and model.embed_tokens has an adapter",
        ),
        (
            Layout(),
            {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "tied": True},
            "adapter.modules_to_save has the embedding, which is the head too in this model",
        ),
        (Layout(pipeline=2), {"target_modules": ["lm_head"]}, "leave chunk 1 of the pipeline"),
        (Layout(pipeline=2), {"target_modules": ["embed_tokens"]}, "leave chunk 2 of the pipeline"),
        (Layout(pipeline=2), {"layers_to_transform": [0]}, "leave chunk 2 of the pipeline"),
        (
            Layout(),
            {"init": "pissa", "rank": 65},
            "adapter.rank is 65, but with adapter.init pissa an adapter is a part of",
        ),
        (Layout(), {"use_dora": True, "dropout": 0.1}, "adapter.dropout is 0.1 with adapter.use_dora"),
        (Layout(), {"use_dora": True, "changes": DEEPSPEED}, "are built for parallel.engine megatron only"),
        (Layout(), {"modules_to_save": ["lm_head"], "changes": DEEPSPEED}, "whose original values the reference needs"),
        (
            Layout(),
            {"dropout": 0.1, "changes": {"objective.loss_type": "aot"}},
            "objective.loss_type aot is computed",
        ),
        (
            Layout(),
            {"family": "mixtral", "changes": {"model.expert_products": "grouped"}},
            "model.expert_products is grouped, but experts with adapters are computed one after the other",
        ),
        (Layout(tensor=4, expert_tensor=2), {"family": "mixtral"}, "adapters of experts are built for 1 or the latter"),
        (
            Layout(tensor=2, expert_tensor=2),
            {"family": "mixtral", "use_dora": True},
            "parallel.expert_tensor is 2 with adapter.use_dora",
        ),
    ],
)
def test_what_adapters_are_not_built_for_is_one_sentence(layout, given, says):
    assert says in refusal(layout, **given)


def test_a_reference_s_adapter_with_another_head_is_refused():
    _, trained = shape_and_spec("llama")
    with pytest.raises(UserError, match=r"reference\.adapter has lm_head whole"):
        check_reference_adapter(replace(trained, modules_to_save=("lm_head",)), trained)


def test_products_by_runs_of_rows_and_by_blocks_are_the_same(monkeypatch):
    """Queries, keys and values of three groups of heads; keys have no adapter."""
    rows = {"q_proj": ((0, 4), (8, 4), (16, 4)), "v_proj": ((6, 2), (14, 2), (22, 2))}
    projections = [Projection("x.q_proj", 2, 0.5, 0, rows["q_proj"]), Projection("x.v_proj", 3, 2.0, 2, rows["v_proj"])]
    adapter = LinearAdapter(projections, is_row_parallel=False)
    output_TO, gradient_TO, low_TR = torch.randn(7, 24), torch.randn(7, 24), torch.randn(7, 5)
    bs = [torch.randn(12, 2), torch.randn(6, 3)]

    def products() -> list[Tensor]:
        added = output_TO.clone()
        adapter.add_outputs(added, low_TR, bs)
        return [added, adapter.low_gradient_TR(gradient_TO, bs), *adapter.b_gradients(gradient_TO, low_TR)]

    by_runs = products()
    monkeypatch.setitem(linear.MOST_RUNS, "cpu", 0)
    for one, other in zip(by_runs, products(), strict=True):
        torch.testing.assert_close(one, other)
    stacked = torch.zeros(24, 5)
    stacked[[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], :2] = 0.5 * bs[0]
    stacked[[6, 7, 14, 15, 22, 23], 2:] = 2.0 * bs[1]
    torch.testing.assert_close(by_runs[0], output_TO + low_TR @ stacked.t())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_begins_as_a_part_of_a_matrix_has_pefts_numbers(init):
    peft = pytest.importorskip("peft")
    linear_layer = torch.nn.Linear(24, 40, bias=False)
    weight, model = linear_layer.weight.detach().clone(), torch.nn.Sequential(linear_layer)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init))
    theirs = {name.split(".")[-3]: p.detach() for name, p in adapted.named_parameters() if "lora_" in name}
    a, b = decompose(weight, init, 4, 1.5)
    assert torch.equal(a, theirs["lora_A"]) and torch.equal(b, theirs["lora_B"])
    torch.testing.assert_close(weight - 1.5 * b @ a, adapted.base_model.model[0].base_layer.weight.detach())


def test_a_plain_adapter_of_twice_the_rank_adds_what_the_trained_one_has_over_its_beginning():
    for use_rslora in (False, True):
        spec = AdapterSpec(4, 6.0, 0.0, use_rslora, False, ("m",), (), "pissa")
        begun = {"m.lora_A.weight": torch.randn(4, 8), "m.lora_B.weight": torch.randn(6, 4)}
        trained = {name: tensor + torch.randn_like(tensor) for name, tensor in begun.items()}
        a, b = (plain_tensor(name, tensor, begun) for name, tensor in trained.items())
        expected = trained["m.lora_B.weight"] @ trained["m.lora_A.weight"]
        expected -= begun["m.lora_B.weight"] @ begun["m.lora_A.weight"]
        torch.testing.assert_close(as_plain(spec).scaling("m") * b @ a, spec.scaling("m") * expected)


def test_bf16_products_are_those_of_peft_s_fp32_adapters_under_autocast():
    """A and B are rounded where they are multiplied; the optimizer's own are in fp32 in either."""
    peft = pytest.importorskip("peft")
    plain = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False).bfloat16())
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False))
    theirs = {name.split(".")[-3]: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert {p.dtype for p in theirs.values()} == {torch.float32}
    hidden, gradient = torch.randn(30, 1, 64).bfloat16(), torch.randn(30, 1, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = adapted(hidden)
    expected.backward(gradient)
    a, b = (theirs[name].detach().bfloat16().requires_grad_() for name in ("lora_A", "lora_B"))
    layer = LinearAdapter([Projection("x.q_proj", 8, 2.0, 0, ((0, 48),))], is_row_parallel=False)
    operands = Operands(layer, LayerRanks(None, False, False), None)
    weight = adapted.base_model.model[0].base_layer.weight.detach()
    output = ColumnParallel.apply(hidden, weight, None, a, None, operands, b)
    output.backward(gradient)
    torch.testing.assert_close(output, expected.to(torch.bfloat16), rtol=2**-7, atol=2**-6)
    for own, name in ((a, "lora_A"), (b, "lora_B")):
        error = float((own.grad.float() - theirs[name].grad).norm() / theirs[name].grad.norm())
        assert error <= 2**-8, (name, error)  # one rounding to bf16
