"""The native head kernels do what their torch twin does, for every shape, as exactly as torch itself, and build or say why
not."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.errors import UserError
from megadpo.model.heads import kernels
from megadpo.model.heads.kernels import PARTS, NativeKernels, TorchKernels, choose_kernels
from megadpo.model.heads.logprob import TOKEN_STATISTICS
from megadpo.platform import native

CPU = torch.device("cpu")
INSTRUCTIONS = ("portable", "AVX2", "AVX-512")


def has_compiler() -> bool:
    try:
        return bool(native.find_compiler(native.LIBRARIES["head"]))
    except native.Unavailable:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def library():
    kernel = NativeKernels("cpu")
    yield kernel
    kernel.library.megadpo_head_use(best_level(kernel))


def best_level(kernel: NativeKernels) -> int:
    return max(level for level in range(len(INSTRUCTIONS)) if kernel.library.megadpo_head_use(level))


def tile(rows: int, columns: int, dtype: torch.dtype, seed: int, spread: float = 4.0) -> tuple[torch.Tensor, ...]:
    """Logits, targets (some of them another rank's), log-normalisers and gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(-columns, 2 * columns + 1, (rows,), generator=generator)
    gradient = torch.randn(rows, generator=generator)
    return logits, targets, logits.double().logsumexp(-1).float(), gradient


def parts_of(kernel: kernels.Kernels, logits: torch.Tensor, targets: torch.Tensor, wanted=TOKEN_STATISTICS) -> torch.Tensor:
    out = torch.full((len(logits), len(PARTS)), 7.0)
    kernel.parts(logits, targets, wanted, out)
    return out


@needs_compiler
@pytest.mark.parametrize("level", range(len(INSTRUCTIONS)), ids=INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_equals_the_torch_twin(library, level, dtype):
    if not library.library.megadpo_head_use(level):
        pytest.skip("this processor has no " + INSTRUCTIONS[level])

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        st.integers(0, 7),
        st.one_of(st.integers(1, 100), st.integers(2000, 4200)),
        st.integers(0, 2**20),
        st.floats(0.01, 60),
        st.integers(0, 5),
    )
    def check(rows, columns, seed, spread, gap):
        logits, targets, log_normaliser, gradient = tile(rows, columns, dtype, seed, spread)
        # Rows of a wider buffer: what lies between them must stay as it is.
        buffer = torch.full((rows, columns + gap), 3.0, dtype=dtype)
        held = buffer[:, :columns]
        held.copy_(logits)
        ours, twins = parts_of(library, held, targets), parts_of(TorchKernels(), logits, targets)
        assert torch.equal(held, logits)
        exact = [PARTS.index("maximum"), PARTS.index("target")]
        assert torch.equal(ours[:, exact], twins[:, exact])
        torch.testing.assert_close(ours, twins, rtol=3e-6, atol=3e-6 * spread * columns**0.5)
        library.gradient_(held, targets, log_normaliser, gradient)
        TorchKernels().gradient_(logits, targets, log_normaliser, gradient)
        # In bfloat16 the two may round to neighbours.
        rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (8e-3, 1e-6)
        torch.testing.assert_close(held.float(), logits.float(), rtol=rtol, atol=atol)
        assert (buffer[:, columns:] == 3).all()

    check()


@needs_compiler
@pytest.mark.parametrize("level", range(len(INSTRUCTIONS)), ids=INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [37, 3001, 32003])
def test_the_error_is_at_most_twice_torchs_own(library, level, dtype, columns):
    if not library.library.megadpo_head_use(level):
        pytest.skip("this processor has no " + INSTRUCTIONS[level])
    logits, targets, _, gradient = tile(64, columns, dtype, seed=columns)
    targets = targets % columns
    exact = logits.double().requires_grad_()
    logps = exact.log_softmax(-1)
    chosen = logps.gather(1, targets[:, None])[:, 0]
    (chosen * gradient).sum().backward()
    entropy = -(logps.exp() * logps).sum(-1)
    # torch's own: the logits as they are, its log_softmax in float32, its gradient in the logits' dtype.
    plain = logits.float().requires_grad_()
    plain_logps = plain.log_softmax(-1)
    plain_chosen = plain_logps.gather(1, targets[:, None])[:, 0]
    (plain_chosen * gradient).sum().backward()
    plain_entropy = -(plain_logps.exp() * plain_logps).sum(-1)
    parts = dict(zip(PARTS, parts_of(library, logits, targets).unbind(1), strict=True))
    log_sum = parts["exponentials"].log()
    ours = logits.clone()
    library.gradient_(ours, targets, parts["maximum"] + log_sum, gradient)

    def error(found: torch.Tensor, true: torch.Tensor) -> float:
        return float((found.detach().double() - true.detach().double()).square().mean().sqrt())

    for found, torchs, true in [
        (parts["target"] - parts["maximum"] - log_sum, plain_chosen, chosen),
        (log_sum - parts["products"] / parts["exponentials"], plain_entropy, entropy),
        (parts["logits"] / columns, plain.mean(-1), exact.mean(-1)),
        (ours, plain.grad.to(dtype), exact.grad),
    ]:
        # Where torch is exact by luck, a rounding of the result is still allowed.
        rounding = torch.finfo(torch.float32).eps * float(true.detach().abs().max()) / 4
        assert error(found, true) <= 2 * error(torchs, true) + rounding


@needs_compiler
def test_a_log_prob_has_the_same_bits_whatever_else_is_wanted_and_on_however_many_threads(library):
    library.library.megadpo_head_use(best_level(library))
    logits, targets, *_ = tile(9, 70001, torch.float32, seed=1)
    first = [PARTS.index(name) for name in ("maximum", "exponentials", "target")]
    everything = parts_of(library, logits, targets)
    assert torch.equal(parts_of(library, logits, targets, ("logp",))[:, first], everything[:, first])
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            assert torch.equal(parts_of(library, logits, targets), everything)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_what_is_not_wanted_is_zero(kind, library):
    kernel = library if kind == "native" else TorchKernels()
    logits, targets, *_ = tile(3, 50, torch.float32, seed=2)
    out = dict(zip(PARTS, parts_of(kernel, logits, targets, ("logp", "correct")).unbind(1), strict=True))
    assert not any(out[name].any() for name in ("products", "logits", "squares"))
    out = dict(zip(PARTS, parts_of(kernel, logits, targets, ("logp", "entropy")).unbind(1), strict=True))
    assert out["products"].all() and not out["squares"].any()


@needs_compiler
@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_log_probs_that_are_none(kind, bad, library):
    kernel = library if kind == "native" else TorchKernels()
    for column in (0, 20, 2047, 2500, 4999):
        logits, targets, *_ = tile(2, 5000, torch.float32, seed=3)
        logits[0, column] = bad
        exponentials = parts_of(kernel, logits, targets)[:, PARTS.index("exponentials")]
        assert exponentials.isnan().tolist() == [True, False]


@needs_compiler
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_a_rank_without_vocabulary_has_empty_parts(kind, library):
    kernel = library if kind == "native" else TorchKernels()
    out = parts_of(kernel, torch.empty(3, 0), torch.tensor([-4, 0, 2]))
    assert out.tolist() == [[-torch.inf, 0, -torch.inf, 0, 0, 0]] * 3


@needs_compiler
@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 1), (0, 5), (1, 0), (3, 0), (1, 1), (3, 1)])
def test_tiles_without_rows_or_with_at_most_one_column_are_as_good_as_others(rows, columns, dtype, kind, library):
    kernel = library if kind == "native" else TorchKernels()
    # torch gives a tile that is computed without rows the strides (1, 0), and a transposed column (1, rows).
    for logits in (2.0 * torch.randn(rows, columns), torch.randn(columns, rows).t() if columns else torch.empty(rows, 0)):
        held, targets, gradient = logits.to(dtype), torch.arange(rows) - 1, torch.randn(rows)
        values = held.float().clone()
        out = parts_of(kernel, held, targets)
        assert out.shape == (rows, len(PARTS)) and torch.equal(held.float(), values)
        if columns == 1:
            is_target = targets == 0
            target = torch.where(is_target, values[:, 0], -torch.inf)
            assert torch.equal(out[:, PARTS.index("maximum")], values[:, 0])
            assert torch.equal(out[:, PARTS.index("target")], target)
            assert torch.equal(out[:, PARTS.index("exponentials")], torch.ones(rows))
        kernel.gradient_(held, targets, values.logsumexp(-1) if columns else torch.zeros(rows), gradient)
        if columns == 1:
            expected = torch.where(is_target, 0.0, -gradient).to(dtype).float()
            torch.testing.assert_close(
                held[:, 0].float(), expected, rtol=8e-3 if dtype is torch.bfloat16 else 1e-6, atol=1e-6
            )


DRIVER = r"""
#include "head.cpp"
#include <cstdio>
#include <cstdlib>
// Buffers of exactly the size that is needed: the sanitizer sees a byte too far.
template <typename Element>
int run(int is_bf16) {
    for (int64_t rows : {0, 1, 3})
        for (int64_t columns : {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 2047, 2048, 2049, 2079, 4101})
            for (int wanted : {0, 1, 3})
                for (int threads : {1, 3}) {
                    std::vector<Element> logits(rows * columns);
                    for (size_t i = 0; i < logits.size(); ++i) {
                        const float x = float((i * 7919) % 1013) / 50.f - 10.f;
                        if (is_bf16) std::memcpy(&logits[i], reinterpret_cast<const char*>(&x) + 2, 2);
                        else std::memcpy(&logits[i], &x, 4);
                    }
                    std::vector<int64_t> targets(rows);
                    for (int64_t row = 0; row < rows; ++row) targets[row] = row == 1 ? -5 : columns - 1 + row;
                    std::vector<float> parts(rows * NUM_PARTS), normalisers(rows, 20.f), gradients(rows, 0.5f);
                    megadpo_head_parts(logits.data(), is_bf16, rows, columns, columns, targets.data(), wanted, parts.data(),
                                       threads);
                    megadpo_head_gradient(logits.data(), is_bf16, rows, columns, columns, targets.data(),
                                          normalisers.data(), gradients.data(), threads);
                    for (int64_t row = 0; columns > 0 && row < rows; ++row)
                        if (!(parts[row * NUM_PARTS + EXPONENTIALS] >= 1.f)) return 1;
                }
    return 0;
}
int main() {
    for (int level = 0; level < 3; ++level)
        if (megadpo_head_use(level) && (run<float>(0) || run<Bf16>(1))) return 1;
    std::puts("clean");
}
"""


@needs_compiler
@pytest.mark.slow
def test_the_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    compiler = native.find_compiler(native.LIBRARIES["head"])
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-std=c++17", "-O1", "-pthread", "-Wno-psabi"]
    command = [compiler, *sanitizers, f"-I{native.source_directory()}", str(source), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in compiled.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("clean\n", 0), ran.stderr


@pytest.mark.slow
def test_the_cuda_kernels_compile_for_ampere_and_hopper(tmp_path, monkeypatch):
    try:
        native.find_compiler(native.LIBRARIES["head_cuda"])
    except native.Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MEGADPO_CACHE", str(tmp_path))
    library = native.LIBRARIES["head_cuda"]
    key = native.source_key(library)
    path = native.built(library, key)
    loaded = ctypes.CDLL(str(path))
    assert native.made_from(loaded) == key
    for name in ("megadpo_head_parts", "megadpo_head_gradient"):
        assert hasattr(loaded, name)


@needs_compiler
@pytest.mark.slow
def test_processes_that_build_at_once_all_get_the_library_and_leave_one_file(tmp_path):
    script = (
        "import ctypes\n"
        "from megadpo.platform import native\n"
        "library = native.LIBRARIES['head']\n"
        "print(native.made_from(ctypes.CDLL(str(native.built(library, native.source_key(library))))))"
    )
    environment = os.environ | {"MEGADPO_CACHE": str(tmp_path), "PYTHONPATH": str(native.PACKAGE.parent)}
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert answers == {native.source_key(native.LIBRARIES["head"]) + "\n"}
    assert [path.suffix for path in sorted((tmp_path / "kernels").iterdir())] == [".lock", ".so"]


@needs_compiler
@pytest.mark.slow
def test_an_installed_library_is_used_unless_its_sources_have_changed_since(tmp_path, monkeypatch):
    library, package = native.LIBRARIES["head"], tmp_path / "megadpo"
    shutil.copytree(native.source_directory(), package / "csrc")
    shutil.copy(native.built(library, native.source_key(library)), package / "_head.so")
    monkeypatch.setattr(native, "PACKAGE", package)
    monkeypatch.setenv("MEGADPO_CACHE", str(tmp_path / "cache"))
    load = native.load.__wrapped__
    assert load("head")._name == str(package / "_head.so")
    assert not (tmp_path / "cache").exists()
    with (package / "csrc" / "head_rows.inc").open("a") as rows:
        rows.write("// newer\n")
    assert str(tmp_path / "cache") in load("head")._name


@pytest.mark.slow
def test_without_a_compiler_torch_does_it_and_says_so_and_native_is_refused(tmp_path):
    script = (
        "import torch\n"
        "from megadpo.errors import UserError\n"
        "from megadpo.model.heads.kernels import choose_kernels\n"
        "from megadpo.platform import native\n"
        f"native.PACKAGE = native.Path({str(tmp_path)!r}) / 'megadpo'\n"
        f"native.source_directory = lambda: native.Path({str(native.source_directory())!r})\n"
        "print(choose_kernels('auto', torch.device('cpu')))\n"
        "try:\n    choose_kernels('native', torch.device('cpu'))\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {"PATH": "/nonexistent", "MEGADPO_CACHE": str(tmp_path), "PYTHONPATH": str(native.PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "torch (there is no C++ compiler)",
        "model.kernels is native, but there is no C++ compiler; install what is missing, or use auto",
    ], done.stderr


@needs_compiler
def test_sources_that_do_not_compile_are_a_reason_with_the_compilers_words(tmp_path, monkeypatch):
    (tmp_path / "head.cpp").write_text("int broken( {}\n")
    (tmp_path / "head_rows.inc").write_text("")
    monkeypatch.setenv("MEGADPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "source_directory", lambda: tmp_path)
    library = native.LIBRARIES["head"]
    with pytest.raises(native.Unavailable, match=r"could not compile .*head\.cpp: .*error"):
        native.built(library, native.source_key(library))
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".lock"]


def test_the_choice_is_what_the_head_uses_from_then_on(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", "auto")
    assert choose_kernels("torch", CPU) == "torch"
    assert isinstance(kernels.head_kernels(CPU), TorchKernels)
    if has_compiler():
        assert choose_kernels("native", CPU).startswith("C++ (")
        assert isinstance(kernels.head_kernels(CPU), NativeKernels)


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGADPO_CACHE", str(tmp_path / "file"))
    library = native.LIBRARIES["head"]
    with pytest.raises(native.Unavailable, match=r"cannot be written|no C\+\+ compiler"):
        native.built(library, native.source_key(library))


def test_native_in_the_configuration_is_one_of_three_choices():
    from megadpo.validation.load import load_config

    with pytest.raises(UserError, match=r"model\.kernels"):
        load_config({}, ["model.kernels=triton"])
