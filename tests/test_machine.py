"""The precision of float32 products: what the user asked for, also in workers, and never less."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from outfluence import (
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    SequentialInfluenceCalculator,
    machine,
)
from outfluence.errors import StoreMismatchError
from outfluence.machine import float32_products, new_memory, precision_asked

CPU = torch.device("cpu")


class AsTold(nn.Module):
    """Tells its precision by its outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * {"highest": 1.0, "high": 2.0, "medium": 3.0}[torch.get_float32_matmul_precision()]


@pytest.fixture
def medium_is_not_better(monkeypatch):
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: False)


@pytest.fixture
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator), torch.randint(0, 2, (6,), generator=generator)


def test_batched_products_are_left_to_mkl_and_to_nothing_less_precise(monkeypatch):
    now = torch.get_float32_matmul_precision
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: True)
    with machine.batched_products():
        assert now() == "highest"
    with float32_products(CPU):
        assert now() == "medium"
        with machine.batched_products():
            assert now() == "highest"
            assert precision_asked() == "highest"
        assert now() == "medium"
    assert now() == "highest"
    for asked in ("high", "medium"):  # what the user has asked for stays
        with float32_products(CPU, asked):
            with machine.batched_products():
                assert now() == asked
            assert now() == asked
    assert now() == "highest"
    with pytest.raises(ZeroDivisionError), float32_products(CPU), machine.batched_products():
        1 / 0  # noqa: B018
    assert now() == "highest"


def test_products_are_those_of_float32():
    """Also where "medium" is set: then it was found to be as exact."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((3, 5, 7), (100, 300, 2000), (256, 256, 256)):
        a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        with float32_products(CPU):
            product = a @ b
        exact = a.double() @ b.double()
        assert (product - exact).norm() < 2e-6 * exact.norm()


def test_the_setting_is_put_back_also_after_errors():
    def fail():
        with float32_products(CPU, "high"):
            assert torch.get_float32_matmul_precision() == "high"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def on_amd(monkeypatch):
    """As if the processor were one of AMD with AVX-512."""
    cpuinfo = "vendor_id : AuthenticAMD\nflags : fpu avx512f"
    monkeypatch.setattr(machine.Path, "read_text", lambda _self: cpuinfo)
    machine._is_onednn_exact.cache_clear()
    yield
    machine._is_onednn_exact.cache_clear()


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize(("error", "chosen"), [(3e-3, "highest"), (1e-7, "medium")])
def test_less_exact_products_are_not_taken(error, chosen, monkeypatch):
    """3e-3 is the error of bfloat16."""
    monkeypatch.setattr(machine, "_error", lambda *_: error)
    with float32_products(CPU):
        assert torch.get_float32_matmul_precision() == chosen


def test_the_trial_is_of_float32_on_the_cpu_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert 1e-9 < machine._error(16, 16, 64) < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(machine.Path, "read_text", lambda _self: "vendor_id : GenuineIntel\nflags : avx512f")
    machine._is_onednn_exact.cache_clear()
    try:
        with float32_products(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        machine._is_onednn_exact.cache_clear()


def test_other_devices_get_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: True)
    with float32_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
    with float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "medium"
        assert precision_asked() == "highest"
        with float32_products(CPU):
            assert torch.get_float32_matmul_precision() == "medium"
    with float32_products(CPU, "high"), float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_threads_that_overlap_leave_it_as_it_was(monkeypatch):
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: True)
    first, second = float32_products(CPU), float32_products(CPU, "high")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "high"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_settings_of_backends_are_put_back(monkeypatch):
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this version of torch has no settings for each backend")
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: True)
    kept = matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with float32_products(CPU):
        assert matmul.fp32_precision == "bf16"
    assert (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == kept


def test_what_is_set_for_each_backend_is_left_alone(monkeypatch):
    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    def never(_precision):
        raise AssertionError("set")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", never)
    monkeypatch.setattr(machine, "_is_onednn_exact", lambda: True)
    assert precision_asked() == ""
    with float32_products(CPU):
        pass


@pytest.mark.usefixtures("medium_is_not_better")
def test_in_memory_it_is_the_users(high):
    data, model = samples(), AsTold()
    told = EkfacInfluence(model, False, 0.1).fit(data).influences(*data)
    torch.set_float32_matmul_precision("highest")
    assert not torch.allclose(EkfacInfluence(model, False, 0.1).fit(data).influences(*data), told)


def test_workers_compute_as_the_client_is_told(high, client, tmp_path):
    torch.manual_seed(0)
    data, model = samples(), AsTold()
    fitted = DirectInfluence(model, F.cross_entropy, 0.1).fit(data)
    expected = fitted.influences(*data).numpy()
    lazy = DaskInfluenceCalculator(fitted, client).influences(data, data)
    assert np.allclose(lazy.to_zarr(tmp_path / "dask.zarr")["scores"].values, expected, rtol=1e-5)
    torch.set_float32_matmul_precision("highest")  # afterwards: it was asked for before
    lazy = SequentialInfluenceCalculator(fitted).influences(data, data)
    with pytest.raises(StoreMismatchError, match="precision"):
        lazy.to_zarr(tmp_path / "dask.zarr")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (700, 1001), (0, 4)])
def test_new_memory_is_like_that_of_torch(dtype, shape):
    memory = new_memory(torch.zeros(1, dtype=dtype), *shape)
    assert (memory.dtype, tuple(memory.shape), memory.data_ptr() % 64) == (dtype, shape, 0)
    assert memory.is_contiguous()
    assert torch.equal(memory.fill_(3), torch.full(shape, 3, dtype=dtype))
