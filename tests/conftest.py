"""Strictness for every test: no silent dtype or rank promotion, four virtual devices, warnings are errors."""

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for the workers and child processes of this test run: programs that several tests need compile once.
    folder = Path(tempfile.gettempdir()) / f"bert6-jax-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs stay mapped, dozens of maps each; Linux gives a process 65,530, and XLA crashes beyond."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside a development checkout; tests that need it are skipped elsewhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no development data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach another machine fails the test."""

    def refuse(*_, **__):
        raise AssertionError("network access")

    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
