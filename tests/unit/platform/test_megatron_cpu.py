"""Megatron-core on a CPU without touching torch: megadpo is a guest in its users' processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.models import save_model, write_hh
from tests.helpers.worlds import run_world

SNAPSHOT = """
import json, sys, types, warnings
import torch, torch._dynamo, torch.distributed, torch.cuda, torch.nn.functional, torch.optim  # dynamo wraps manual_seed

def snapshot():
    places = {
        "torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "random": torch.cuda.random, "Module": torch.nn.Module,
        "distributed": torch.distributed, "nvtx": torch.cuda.nvtx, "autograd": torch.autograd, "optim": torch.optim,
        "functional": torch.nn.functional,
    }
    return {
        f"{place}.{name}": id(value)
        for place, holder in places.items()
        for name, value in vars(holder).items()
        # submodules and lazily made values come and go with imports; functions, methods and classes must stay
        if callable(value) and not isinstance(value, types.ModuleType)
    }

filters = list(warnings.filters)
threads = torch.get_num_threads()
before = snapshot()
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_megatron_is_imported_after_it_was_prepared_for():
    """Imported before, its modules would have torch.compile make something of their functions, whose import alone takes two
    seconds; Triton's is not needed either."""
    code = "import sys, megadpo.training.trainer as _; print({name.split('.')[0] for name in sys.modules})"
    imported = _run(code)
    assert "'torch'" in imported and "'megatron'" not in imported and "'triton'" not in imported


@pytest.mark.slow
def test_megatron_and_deepspeed_bring_no_tracker_along_and_they_can_be_imported_after():
    """They import them for logs that are not written here, at the price of seconds of every process."""
    pytest.importorskip("deepspeed")
    code = (
        "import sys\n"
        "from megadpo.platform.megatron_cpu import prepare_megatron\n"
        "prepare_megatron()\n"
        "import megadpo.engine.deepspeed.runtime\n"
        "print({name.split('.')[0] for name in sys.modules})\n"
        "import torch.utils.tensorboard\n"
        "print(torch.utils.tensorboard.SummaryWriter.__name__)"
    )
    imported, after = _run(code).splitlines()[-2:]
    assert "'megatron'" in imported and "'deepspeed'" in imported
    assert not any(f"'{name}'" in imported for name in ("wandb", "mlflow", "tensorboard"))
    assert after == "SummaryWriter"


@pytest.mark.slow
def test_training_in_a_users_process_leaves_torch_as_it_was(tmp_path):
    save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    write_hh(tmp_path / "train.jsonl", 20)
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 1, "pairs_per_step": 4, "clip_norm": 0.01},
        "output_dir": str(tmp_path / "run"),
    }
    code = (
        SNAPSHOT
        + f"""
import megadpo
megadpo.train(json.loads({json.dumps(settings)!r}))
after = snapshot()
changed = sorted(name for name in before if after.get(name) != before[name])
added = sorted(name for name in after if name not in before and name.startswith(("Tensor.", "cuda.", "torch.")))
print(json.dumps([changed, added, torch.get_num_threads() == threads, warnings.filters == filters,
                  torch.distributed.is_initialized()]))
"""
    )
    changed, added, same_threads, _, initialized = json.loads(_run(code).strip().splitlines()[-1])
    assert not changed and not [name for name in added if name.startswith(("Tensor.", "cuda."))]
    assert same_threads and not initialized


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.slow
def test_other_libraries_are_as_they_were_after_training(tmp_path, engine):
    """Nothing of megadpo's is left in modules of others, nor in their classes, though something was put there meanwhile; nor
    is a model, an optimizer or a thread of a process group, of which there would be more with each run in a process."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    save_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    write_hh(tmp_path / "train.jsonl", 20)
    options = {"zero_stage": 3} if engine == "deepspeed" else {"gradient_accumulation_fusion": True}
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 1, "pairs_per_step": 4},
        "parallel": {"engine": engine, **options},
        "output_dir": str(tmp_path / "run"),
    }
    code = f"""
import gc, inspect, json, pathlib, sys
import megadpo

def comes_from_us(value):
    value = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    return str(getattr(value, "__module__", None)).startswith("megadpo")

def patched():
    found = []
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] not in ("megadpo", "__main__", "__mp_main__"):
            for name, value in list(getattr(module, "__dict__", {{}}).items()):
                found += [f"{{module_name}}.{{name}}"] * comes_from_us(value)
                if inspect.isclass(value) and value.__module__ == module_name:
                    found += [f"{{module_name}}.{{name}}.{{key}}" for key, item in list(vars(value).items())
                              if comes_from_us(item)]
    return sorted(found)

def kept():
    gc.collect()
    kinds = {{type(thing).__name__ for thing in gc.get_objects()}}
    kinds &= {{"TransformerLayer", "DistributedOptimizer", "Runtime"}}
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sorted(kinds), names.count("gloo_tcp_loop")

meanwhile, kinds, num_groups = [], [], []
def note(step, metrics):
    meanwhile.extend(patched())
    kinds[:], num_groups[:] = kept()[0], [kept()[1]]

megadpo.train(json.loads({json.dumps(settings)!r}), megadpo.Callbacks(on_step_end=note))
print(json.dumps([meanwhile, patched(), [kinds, *num_groups], kept()]))
"""
    import torch

    meanwhile, left, kept_meanwhile, kept = json.loads(_run(code).strip().splitlines()[-1])
    assert not left and not kept[0] and "TransformerLayer" in kept_meanwhile[0]
    assert kept[1] <= 4 < 10 < kept_meanwhile[1], "torch keeps its last default group, DeepSpeed some of its own"
    if engine == "deepspeed":
        assert "deepspeed.runtime.zero.stage3.assert_ints_same_as_other_ranks" in meanwhile
    if not torch.cuda.is_available():
        assert "megatron.core.pipeline_parallel.schedules.torch" in meanwhile


def test_importing_megadpo_imports_neither_torch_nor_megatron():
    code = "import sys, megadpo; print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    assert _run(code).strip() == "[]"


def test_tensor_methods_are_redirected_only_inside_the_scope():
    import torch

    from megadpo.platform.megatron_cpu import cpu_tensors_pass_for_cuda

    if torch.cuda.is_available():
        pytest.skip("nothing is redirected where there is an accelerator")
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    original = torch.Tensor.type
    with pytest.raises(ZeroDivisionError), cpu_tensors_pass_for_cuda():
        assert tensor.type() == "torch.cuda.BFloat16Tensor" and tensor.cuda() is tensor
        assert tensor.type(torch.float32).dtype is torch.float32
        raise ZeroDivisionError
    assert tensor.type() == "torch.BFloat16Tensor" and torch.Tensor.type is original
    assert "type" not in vars(torch.Tensor) and "cuda" not in vars(torch.Tensor)


def test_megatron_modules_make_cpu_tensors_and_torch_does_not():
    import torch
    from megatron.core.optimizer import clip_grads

    from megadpo.platform.megatron_cpu import prepare_megatron

    prepare_megatron()
    if torch.cuda.is_available():
        assert clip_grads.torch is torch
        return
    assert clip_grads.torch is not torch and clip_grads.torch.float32 is torch.float32
    assert clip_grads.torch.zeros(1, device="cuda").device == torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def gather_and_reduce_uneven() -> tuple[list[float], list[float]]:
    import torch
    import torch.distributed as dist

    from megadpo.platform.megatron_cpu import prepare_megatron

    prepare_megatron()
    from megatron.core.tensor_parallel import mappings

    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), [1, 3]
    parts = [torch.zeros(size) for size in sizes]
    mappings.torch.distributed.all_gather(parts, torch.full((sizes[rank],), rank + 1.0))
    own = torch.zeros(sizes[rank])
    mappings.torch.distributed.reduce_scatter(own, [torch.full((size,), rank + 1.0) for size in sizes])
    dist.destroy_process_group()
    return torch.cat(parts).tolist(), own.tolist()


def test_parts_of_different_sizes_are_gathered_and_added_up_over_gloo():
    assert run_world(2, gather_and_reduce_uneven) == [([1, 2, 2, 2], [3]), ([1, 2, 2, 2], [3, 3, 3])]
