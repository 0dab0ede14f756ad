"""A safetensors file of ours: the bytes that safetensors writes, with their hash; on a disk that refuses, one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from megadpo.checkpoint.hf import DTYPES
from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.errors import UserError


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{name} {size}": torch.randn(size).to(dtype) for name, dtype in DTYPES.items() for size in (1, 7)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), 'ä"\n': torch.ones(2, 3, dtype=torch.bfloat16)}
    tensors["transposed"] = torch.randn(5, 3).T.contiguous()
    save_file(tensors, str(tmp_path / "theirs"), metadata={"format": "pt"})
    record = write_tensor_file(tensors, tmp_path / "ours")
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert (record.size, record.digest) == (len(content), xxhash.xxh3_128_hexdigest(content))


def test_a_disk_that_refuses_is_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        write_tensor_file({"a": torch.zeros(3)}, tmp_path / "gone" / "file")
    (tmp_path / "file").symlink_to("/dev/full")  # the link is what goes
    with pytest.raises(UserError, match=r"file cannot be written: No space left on device"):
        write_tensor_file({"a": torch.zeros(3)}, tmp_path / "file")
    assert not any(tmp_path.iterdir())
