"""What the device can do is known before it is asked to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megadpo.platform.device import bf16_is_slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processors")
def test_a_processor_is_slow_in_bf16_where_it_lacks_the_instructions_that_torch_uses() -> None:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None:
        pytest.skip("this processor's flags are not told")
    assert bf16_is_slow() == (not {"avx512bw", "avx512vl", "avx512dq"} <= set(flags[1].split()))
