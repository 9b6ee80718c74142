"""Triton kernels for codes: under the interpreter and compiled without a GPU, on CUDA where there is one, and the PyTorch way without Triton."""

# ruff: noqa: PT018

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_quant import mlp, randn, stir, subjects

import peftlab
from peftlab.quant import codes as C
from peftlab.quant import packed
from peftlab.quant.kernels import triton as K
from peftlab.quant.products import multiply

HERE = Path(__file__).parent
KINDS, DTYPES = ("nf4", "fp4", "int8"), (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def quantised(W, kind, b=64, double=True):
    return C.quantise(W, kind, None, False) if kind == "int8" else C.quantise(W, kind, b, double)


def same(a, b):
    a, b = a.cpu(), b.cpu()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def needs_triton():
    """Triton, or a skip where there is none that compiles the kernels."""
    triton = pytest.importorskip("triton")
    if K._module() is None:
        pytest.skip(f"Triton {triton.__version__} is too old for the kernels")
    return triton


# ---------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("part", ["decode", "quantise", "product", "layers"])
def test_under_the_interpreter(part):
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    needs_triton()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / "interpreted_kernels.py"), "-k", f"test_{part}"]
    done = subprocess.run(command, cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout) and not re.search(r"\d+ (failed|skipped|error)", done.stdout), done.stdout[-2000:]


POINTERS = {
    "codes": "*u8", "absmax": "*u8", "nested": "*fp32", "offset": "*fp32", "dynamic": "*fp32", "book": "*fp32", "borders": "*fp32", "order": "*i32",
    "nearest": "*u8", "second": "*fp32",
}  # fmt: skip
ROWS = {"codes": "*i8", "absmax": "*fp32"}
BLOCKS = dict(NESTED=True, GROUP=256, B=64)
TILE = dict(FOUR=True, G=2, C=64, **BLOCKS)
BYTES = dict(FOUR=False, NESTED=False, GROUP=1, B=1, G=1, C=128)
COMPILED = {
    "decode_blocks": ("decode_blocks", {}, dict(R=64, FORM="bfloat16", **BLOCKS)),
    "decode_rows": ("decode_rows", ROWS, dict(BLOCK=2048, FORM="bfloat16")),
    "quantise_blocks": ("quantise_blocks", {"absmax": "*fp32"}, dict(FLOOR=1e-38, B=64, R=64)),
    "quantise_scales": ("quantise_scales", {"absmax": "*fp32"}, dict(GROUP=256)),
    "quantise_rows": ("quantise_rows", ROWS, dict(BLOCK=4096)),
    "one_row": ("one_row", {}, dict(BIAS=True, BN=8, FORM="bfloat16", CAST="float16", **TILE)),
    "rows_forward": ("rows_forward", {}, dict(BIAS=True, BM=16, BN=32, FORM="bfloat16", CAST="float16", **TILE)),
    "rows_backward": ("rows_backward", {}, dict(BM=16, BN=128, FORM="bfloat16", CAST="float16", **TILE)),
    "rows_forward, int8": ("rows_forward", ROWS, dict(BIAS=True, BM=16, BN=32, FORM="float32", CAST="float16", **BYTES)),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_arithmetic_is_exact(case, capability, tmp_path, monkeypatch):
    """For a GPU that need not be there: every kernel compiles, no product is fused with a sum, and nothing small is flushed to zero."""
    triton = needs_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, pointers, constants = COMPILED[case]
    constants = {k: getattr(triton.language, v) if isinstance(v, str) else v for k, v in constants.items()}
    kernel = getattr(K._module(), name)
    kinds = dict.fromkeys(kernel.arg_names, "i32") | {k: "constexpr" for k in constants} | dict.fromkeys(("x", "bias", "y", "out"), "*bf16")
    kinds |= POINTERS | pointers
    source = ASTSource(fn=kernel, signature={k: kinds[k] for k in kernel.arg_names}, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    code = built.asm["ptx"]
    assert "ftz" not in code and not re.search(r"(mul|add|sub|div)\.f32|div\.(full|approx)|rcp\.approx", code)
    assert ("fma.rn.f32" in code) == (name == "one_row")  # where tl.fma adds up a product
    assert "cvt.rn.bf16" in code or name.startswith("quantise")
    assert ("mma" in code) == name.startswith("rows_")


def test_every_kernel_is_compiled_above():
    kernels = re.findall(r"^def ([a-z]\w+)\(", (Path(K.__file__).parent / "triton_source.py").read_text(encoding="utf8"), re.MULTILINE)
    assert set(kernels) == {name for name, *_ in COMPILED.values()}


class Recorder:
    """Stands for the kernels' module: what is launched, and with which options."""

    TYPES = dict.fromkeys(DTYPES)

    def __init__(self):
        self.launched = []

    def __getattr__(self, name):
        recorder = self

        class Kernel:
            def __getitem__(self, grid):
                assert all(n > 0 for n in grid)
                return lambda *args, **options: recorder.launched.append((name, options["enable_fp_fusion"]))

        return Kernel()


def test_no_launch_fuses_a_product_with_a_sum(monkeypatch):
    four, eight, x = quantised(randn(20, 64), "nf4"), quantised(randn(20, 64), "int8"), randn(3, 64)
    recorder = Recorder()
    monkeypatch.setattr(K, "_module", lambda: recorder)
    monkeypatch.setattr(K, "serves", lambda *tensors: True)
    for p in (four, eight):
        C.dequantise(p)
        multiply(x, None, p, False), multiply(x[0], None, p, False), multiply(randn(3, 20), None, p, True)
    tables, memory = C.tables("nf4", torch.device("cpu")), torch.ones(20)
    K.quantise_blocks(x.view(-1), 64, C.FLOOR, tables, memory, memory), K.quantise_rows(x, memory, memory), K.quantise_scales(memory, memory, tables)
    assert set(recorder.launched) == {(name, False) for name, *_ in COMPILED.values()}


def test_the_cpu_goes_the_pytorch_way(monkeypatch):
    """Whether Triton is there or not: nothing of it is imported, or launched, for CPU tensors."""
    for name in ("fill", "quantise_blocks", "quantise_scales", "quantise_rows", "multiply", "works"):
        monkeypatch.setattr(K, name, lambda *a: pytest.fail("a kernel for CPU tensors"))
    for kind in KINDS:
        p = quantised(randn(20, 64), kind)
        assert not K.serves(p.codes)
        assert torch.equal(multiply(randn(2, 64), None, p, False), F.linear(randn(2, 64), C.dequantise(p)))


def test_without_triton_everything_works():
    """In a process in which Triton cannot be imported."""
    script = """
        import sys, torch
        sys.modules["triton"] = None
        import peftlab
        from peftlab.quant.kernels import triton as kernels
        assert kernels._module() is None
        kernels.serves = lambda *tensors: kernels.works(torch.device("cuda"))  # as for tensors on CUDA
        torch.manual_seed(0)
        model = peftlab.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8)), targets="*")
        peftlab.wrap(model, "lora", r=2, targets="*")
        model(torch.randn(3, 64)).sum().backward()
        assert peftlab.dequantize(peftlab.unwrap(model))[0].weight.shape == (8, 64)
    """
    import textwrap

    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_old_triton_is_as_none(monkeypatch):
    triton = pytest.importorskip("triton")
    there = tuple(map(int, triton.__version__.split(".")[:2]))
    assert (K._module.__wrapped__() is not None) == (there >= K.EARLIEST)
    monkeypatch.setattr(K, "EARLIEST", (999, 0))
    assert K._module.__wrapped__() is None


@pytest.mark.parametrize("fault", [RuntimeError("Failed to find C compiler"), None])
def test_a_triton_that_does_not_work_is_left_alone_with_a_warning(monkeypatch, fault):
    """The first decode on a device decides: where it raises, or comes out wrong, PyTorch goes on."""

    def sound(device):
        if fault is not None:
            raise fault
        return False

    monkeypatch.setattr(K, "sound", sound)
    monkeypatch.setattr(K, "_module", lambda: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="Triton kernels do not work on cuda:7 .*(C compiler|value is wrong).*decoded by PyTorch"):
        assert K.works.__wrapped__(torch.device("cuda:7")) is False
    monkeypatch.setattr(K, "sound", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert K.works.__wrapped__(torch.device("cuda:7")) is True
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert K.works.__wrapped__(torch.device("cuda:7")) is False
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
        monkeypatch.setattr(torch.version, "hip", "6.2")
        assert K.works.__wrapped__(torch.device("cuda:7")) is False


def test_memory_that_runs_out_is_no_fault_of_triton(monkeypatch):
    def sound(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(K, "sound", sound)
    monkeypatch.setattr(K, "_module", lambda: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(torch.OutOfMemoryError):
        K.works.__wrapped__(torch.device("cuda:7"))


# ---------------------------------------------------------------- on CUDA


def moved(p, device="cuda"):
    return packed.Packed(p.format, *(t if t is None else t.to(device) for t in p[1:]))


def plainly(monkeypatch, f):
    """What PyTorch's own operations give."""
    with monkeypatch.context() as m:
        m.setattr(K, "serves", lambda *tensors: False)
        return f()


def cases_of(kind, dtype):
    """(block size, name, tensor), as far as there are codes for it."""
    for b in (64,) if kind == "int8" else packed.BLOCKSIZES:
        for name, x in subjects("nf4" if kind == "int8" else kind, b).items():
            if kind != "int8" or x.ndim > 1:
                yield b, name, x.to(dtype)


@cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_decodes_as_the_cpu(kind, dtype, monkeypatch):
    for b, name, x in cases_of(kind, dtype):
        p = quantised(x, kind, b)
        q, n = moved(p), x.numel()
        assert K.serves(q.codes), "the kernels are not used"
        assert same(C.dequantise(q), C.dequantise(p)), (name, b)
        assert same(plainly(monkeypatch, lambda q=q: C.dequantise(q)), C.dequantise(p)), (name, b)
        for i, j in ((n // 3, n // 3 * 2), (n - 1, n)):
            for out in DTYPES:
                a, c = torch.empty(j - i, dtype=out, device="cuda"), torch.empty(j - i, dtype=out)
                C.fill(q, i, j, a), C.fill(p, i, j, c)
                assert same(a, c), (name, b, i, j, out)


@cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_quantises_as_the_cpu(kind, dtype, monkeypatch):
    """Codes and absmax. Of double quantisation, the mean is a sum whose order is the device's."""
    for b, name, x in cases_of(kind, dtype):
        p, q = quantised(x, kind, b, False), quantised(x.cuda(), kind, b, False)
        assert same(p.codes, q.codes) and same(p.absmax, q.absmax), (name, b)
        double = quantised(x.cuda(), kind, b, True)
        plain = plainly(monkeypatch, lambda x=x, b=b: quantised(x.cuda(), kind, b, True))
        assert all(same(s, t) for s, t in zip(double[1:], plain[1:], strict=True) if t is not None), (name, b)


@cuda
def test_cuda_refuses_what_is_not_finite():
    for kind in KINDS:
        for bad in (float("inf"), float("-inf"), float("nan")):
            W = randn(8, 64).cuda()
            W[3, 5] = bad
            with pytest.raises(ValueError, match="not finite"):
                quantised(W, kind)


@cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 300])
def test_cuda_products_are_the_dense_ones(kind, dtype, rows):
    for (n_out, n_in), b in (((768, 576), 64), ((1031, 4096), 4096), ((9, 96), 32), ((40, 65), 64)):
        p, bias = moved(quantised(randn(n_out, n_in).to(dtype), kind, b)), randn(n_out, seed=1).to(dtype).cuda()
        W = C.dequantise(p).double()
        x, g = randn(rows, n_in, seed=2).to(dtype).cuda(), randn(rows, n_out, seed=3).to(dtype).cuda()
        for found, wanted in (
            (multiply(x, bias, p, False), F.linear(x.double(), W, bias.double())),
            (multiply(x, None, p, False), x.double() @ W.t()),
            (multiply(g, None, p, True), g.double() @ W),
        ):
            assert found.dtype == dtype and (found.double() - wanted).norm() <= LIMIT[dtype] * wanted.norm()
    unit = torch.eye(64, dtype=dtype, device="cuda")[:16]
    p = moved(quantised(randn(48, 64).to(dtype), kind))
    assert K.fuses(unit, p, False) and torch.equal(multiply(unit, None, p, False).t(), C.dequantise(p)[:, :16])


@cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_layers_train_as_on_the_cpu(kind, dtype):
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    model = stir(peftlab.wrap(peftlab.quantize(mlp(64).to(dtype), kind, targets=["0"], double_quant=False), "lora", r=2, targets=["0"]))
    found = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        x = randn(2, 3, 64).to(device, dtype).requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert (a.cpu().double() - b.cpu().double()).norm() <= limit * a.double().norm()


@cuda
def test_cuda_compiles_whole():
    """Inside the operators that a compiler sees, the kernels serve."""
    model = peftlab.quantize(mlp(64).cuda(), targets="*").requires_grad_(False)
    x = randn(5, 64).cuda()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
