"""What `convert import` takes: seconds against a plain copy of the file, memory of a process against what it writes.

A made-up Llama of the size asked for, in bf16 and in one file, is imported into two parts, in turns by one process and by
two, and copied (and waited for until it is on the disk, as an import is). Memory is the highest resident set of a process
that imports one of the two parts, mapped files included, beyond what it had when its libraries were loaded: the larger of
both parts' is said.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=3, warm_up=1)
    parser.add_argument("--mib", type=int, default=2048, metavar="N", help="size of the model (2048)")
    parser.add_argument("--directory", metavar="DIR", help="on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--arm", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.arm is not None:
        print(peak_of_a_part(Path(options.arm), options.rank))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        sizes = make_model(root / "model", options.mib)
        arms = {
            "copy": lambda number: _copy(root, number),
            "import": lambda number: _import(root, number, 1),
            "import by 2 processes": lambda number: _import(root, number, 2),
        }
        seconds = interleaved(arms, options.rounds, options.warm_up)
        peaks = [_peak_in_a_process(root / "model", rank) for rank in range(2)]
    report |= {"model": sizes, "seconds": seconds, "peak_bytes": peaks}
    report["share_of_a_copy_s_speed"] = {
        name: median_ratio(seconds["copy"], seconds[name]) for name in arms if name != "copy"
    }
    rows = [
        [name, f"{statistics.median(values):.2f}", f"{report['share_of_a_copy_s_speed'].get(name, 1):.2f}"]
        for name, values in seconds.items()
    ]
    print_table(f"{sizes['bytes'] / MIB:,.0f} MiB in one file", ("", "median seconds", "share of a copy's speed"), rows)
    print(
        f"a process that writes one of two parts: {max(peaks) / MIB:,.0f} MiB at most, for a part of "
        f"{sizes['part_bytes'] / MIB:,.0f} MiB; the largest tensor has {sizes['largest_bytes'] / MIB:,.0f} MiB: "
        f"{(max(peaks) - sizes['part_bytes'] - sizes['largest_bytes']) / MIB:,.0f} MiB beyond both"
    )


def make_model(directory: Path, mib: int) -> dict[str, int]:
    """A Llama of about so many MiB with random weights in bf16; its bytes, those of a half, and of its largest tensor."""
    import torch
    from transformers import LlamaConfig

    from megadpo.checkpoint.tensor_file import write_tensor_file
    from megadpo.model.families import logical_shapes, shape_of

    layer_bytes = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=max(round((mib * MIB - 2 * 2 * 16384 * 1024) / layer_bytes), 2),
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=16384,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    block = torch.randn(16384 * 1024).bfloat16()
    shapes = logical_shapes(shape_of(config))
    tensors = {name: block[: torch.Size(size).numel()].view(size) for name, size in shapes.items()}
    write_tensor_file(tensors, directory / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    return {"bytes": total, "part_bytes": total // 2, "largest_bytes": max(tensor.nbytes for tensor in tensors.values())}


def _peak_in_a_process(model: Path, rank: int) -> int:
    child = [sys.executable, "-m", "benchmarks", "conversion", "--arm", str(model), "--rank", str(rank)]
    return int(subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_of_a_part(model: Path, rank: int) -> int:
    """Bytes that the resident set grows by while this process imports the part of one of two tensor ranks."""
    from megadpo.checkpoint.importing import ImportOptions, _import_part, _open_import
    from megadpo.checkpoint.staging import begin
    from megadpo.platform.allocator import give_back_freed_blocks

    give_back_freed_blocks()
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder) / "out"
        begin(out)
        options, parts = ImportOptions(num_tensor=2), {f"pp00-tp{rank:02d}": (0, rank)}
        _open_import(str(model), options).source.release()  # which loads libraries
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest is from now on
        _import_part(str(model), str(out), options, parts, f"pp00-tp{rank:02d}")
        return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _copy(root: Path, number: int) -> None:
    from megadpo.checkpoint.staging import sync

    shutil.copyfile(root / "model" / "model.safetensors", root / f"copy-{number}")
    sync(root / f"copy-{number}")
    (root / f"copy-{number}").unlink()


def _import(root: Path, number: int, num_processes: int) -> None:
    from megadpo.checkpoint.importing import ImportOptions, import_model

    import_model(root / "model", root / f"out-{number}", ImportOptions(2, num_processes=num_processes))
    shutil.rmtree(root / f"out-{number}")
