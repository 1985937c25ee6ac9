"""Compiling, keeping and launching CUDA kernels, with the compiler and the driver played by the tests where there is no GPU."""

import contextlib
import ctypes
import struct
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

import matquant.cuda
from matquant.cuda import CACHE_VARIABLE, Kernel, read_source
from matquant.cuda.arguments import Address
from matquant.cuda.cuda_driver import architecture, nvrtc_compile, nvrtc_version
from matquant.cuda.pdl import PdlLauncher
from matquant.cuda.source import cache_folder, compile_options, cubin
from matquant.errors import UserError

CPU = -1  # what Tensor.get_device says of the CPU, on which the tests' tensors lie


class RecordingDriver:
    """Record of the launches; reads each argument's first 8 bytes through the array of addresses."""

    def __init__(self, arguments: int, available: int = 200_000) -> None:
        self.arguments, self.available = arguments, available
        self.launches: list[dict] = []
        self.allowed: list[int] = []

    def current_device(self) -> int:
        return CPU

    def current_stream(self, device: int) -> int:
        return 77

    def allow_shared(self, function: int, size: int) -> None:
        if size > self.available:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE")
        self.allowed.append(size)

    def launch(self, function: int, device: int, pdl: bool, *rest: int) -> None:
        *shape, shared, stream, address, extra = rest
        pointers = (ctypes.c_void_p * self.arguments).from_address(address)
        slots = [ctypes.string_at(pointer, 8) for pointer in pointers]
        self.launches.append({"shape": shape, "shared": shared, "stream": stream, "slots": slots, "extra": extra})

    def prepare(self, *launch: int):
        def launch_prepared(function: int, stream: int, address: int) -> int:
            self.launch(function, CPU, True, *launch, stream, address, 0)
            return 0

        return launch_prepared


def slot(form, value) -> bytes:
    return np.array([value], form).tobytes().ljust(8, b"\0")


def test_a_launch_passes_each_kind_of_argument_as_the_kernel_reads_it():
    tensor = torch.arange(4.0)
    args = (
        tensor,
        None,
        -7,
        0.1,
        np.int64(-(2**40)),
        np.float16(0.3),
        ctypes.c_uint64(2**63),
        ctypes.c_double(0.1),
        np.uint8(200),
    )
    driver = RecordingDriver(len(args))
    kernel = Kernel("k", 5, CPU, driver)
    for _ in range(2):
        kernel.launch((3, 4), 128, args, 1000)
    expected = [
        slot("u8", tensor.data_ptr()),
        slot("u8", 0),
        slot("i4", -7),
        slot("f4", 0.1),
        slot("i8", -(2**40)),
        slot("f2", 0.3),
        slot("u8", 2**63),
        slot("f8", 0.1),
        slot("u1", 200),
    ]
    for launch in driver.launches:
        assert launch["slots"] == expected
        assert (launch["shape"], launch["shared"], launch["stream"], launch["extra"]) == (
            [3, 4, 1, 128, 1, 1],
            1000,
            77,
            0,
        )


def test_an_overlapping_launch_hands_the_driver_what_its_header_asks_for(monkeypatch):
    """Offsets as in cuda.h: CUlaunchConfig is grid, block, shared bytes, stream, attributes and their number."""
    seen = []

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def launch_kernel_ex(config, function, arguments, extra):
        *sizes, stream, attributes, count = struct.unpack("@7I4xQQI", ctypes.string_at(config, 52))
        seen.append((sizes, stream, count, function, arguments, extra))
        seen.append(struct.unpack("@i4xi", ctypes.string_at(attributes, 12)))
        return stream % 1000

    def check_status(status):
        raise OverflowError(f"status {status}")

    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(cuLaunchKernelEx=launch_kernel_ex))
    launcher = PdlLauncher(check_status)
    for stream, status in ((77, 77), (2**40, 2**40 % 1000), (2000, 0)):
        refused = pytest.raises(OverflowError, match=f"status {status}") if status else contextlib.nullcontext()
        with refused:
            launcher.launch(5, 3, 4, 1, 128, 1, 1, 1000, stream, 4096, 0)
        assert seen[-2:] == [([3, 4, 1, 128, 1, 1, 1000], stream, 1, 5, 4096, None), (6, 1)]
        prepared = launcher.prepare(3, 4, 1, 128, 1, 1, 1000)
        for _ in range(2):
            assert prepared(5, stream, 4096) == status
            assert seen[-2:] == seen[-4:-2]


def test_a_prepared_launch_passes_what_a_full_one_does():
    tensors = torch.zeros(6, 4)
    args = (b"a structure of 24 bytes!", tensors[0], None, None, 7, 0.5, np.int64(9))
    driver = RecordingDriver(len(args))
    kernel = Kernel("k", 5, CPU, driver, pdl=True)
    prepared = kernel.prepare((3, 2), 128, args, 60_000, slice(1, 4))
    for first, second, third in ((0, 1, 2), (3, None, 4), (5, 5, None)):
        chosen = [None if one is None else tensors[one] for one in (first, second, third)]
        prepared.launch(*(0 if one is None else one.data_ptr() for one in chosen))
        kernel.launch((3, 2), 128, (args[0], *chosen, *args[4:]), 60_000)
        assert driver.launches[-1] == driver.launches[-2]
    assert len(driver.launches) == 6
    assert driver.allowed == [60_000]
    assert Kernel("k", 5, CPU, driver).prepare(1, 1, args, 0, slice(1, 4)) is None


def test_a_refused_prepared_launch_is_tried_again_in_full_and_says_what_was_requested():
    class Refusing(RecordingDriver):
        def prepare(self, *launch: int):
            return lambda *_: 201

    driver = Refusing(2)
    kernel = Kernel("k", 5, CPU, driver, pdl=True)
    prepared = kernel.prepare(9, 64, (None, 3), 16, slice(0, 1))
    prepared.launch(4096)
    assert driver.launches[0]["slots"] == [slot("u8", 4096), slot("i4", 3)]

    def refuse(*_):
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    driver.launch = refuse
    with pytest.raises(
        RuntimeError, match="The launch of k with grid 9, block 64 .* CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
    ):
        prepared.launch(4096)


def test_a_parameter_and_none_may_take_turns_as_addresses():
    driver = RecordingDriver(1)
    kernel = Kernel("k", 5, CPU, driver)
    parameter = torch.nn.Parameter(torch.zeros(3))
    kernel.launch(1, 32, (None,))
    kernel.launch(1, 32, (parameter,))
    assert [launch["slots"][0] for launch in driver.launches] == [slot("u8", 0), slot("u8", parameter.data_ptr())]


@pytest.mark.parametrize(
    ("first", "later", "error"),
    [
        (("text",), None, "not str"),
        ((True,), None, "not bool"),
        ((3,), (2**31,), "do not fit those of its first launch"),
        ((3,), (0.5,), "They are float"),
        ((3,), (3, 4), "They are int, int"),
        ((torch.zeros(1), 3), (3, torch.zeros(1)), "They are int, Tensor"),
        ((ctypes.c_long(3),), (), "do not fit"),
    ],
)
def test_arguments_that_cannot_be_passed_are_refused_before_the_launch(first, later, error):
    driver = RecordingDriver(len(first))
    kernel = Kernel("k", 5, CPU, driver)
    if later is not None:
        kernel.launch(1, 32, first)
    with pytest.raises(TypeError, match=error):
        kernel.launch(1, 32, first if later is None else later)
    assert len(driver.launches) == (later is not None)


def test_a_tensor_on_another_device_is_refused():
    kernel = Kernel("k", 5, 1, RecordingDriver(1))
    with pytest.raises(ValueError, match="A tensor on cpu was passed to a kernel on cuda:1"):
        kernel.launch(1, 32, (torch.zeros(1),))


def test_large_shared_memory_is_asked_for_once_per_size():
    driver = RecordingDriver(0)
    kernel = Kernel("k", 5, CPU, driver)
    for size in (100, 48 * 1024, 60_000, 50_000, 60_000, 90_000):
        kernel.launch(1, 32, (), size)
    assert driver.allowed == [60_000, 90_000]
    with pytest.raises(RuntimeError, match="k needs 300000 bytes of shared memory per CTA, more than device -1 has"):
        kernel.launch(1, 32, (), 300_000)


def test_a_refused_launch_says_what_was_asked_for():
    class Refusing(RecordingDriver):
        def launch(self, *launch):
            raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    with pytest.raises(
        RuntimeError, match=r"The launch of k with grid \(9, 2\), block 1024 and 64 bytes .* failed: .*OUT_OF_RES"
    ):
        Kernel("k", 5, CPU, Refusing(0)).launch((9, 2), 1024, (), 64)


def test_threads_do_not_write_each_others_arguments():
    """One thread is held inside the driver while another launches the same kernel."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(RecordingDriver):
        def launch(self, function, device, *rest):
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                go_on.wait(20)
            super().launch(function, device, *rest)

    driver = Slow(1)
    kernel = Kernel("k", 5, CPU, driver, pdl=True)
    prepared = kernel.prepare(1, 32, (None,), 0, slice(0, 1))
    for launch, form in ((lambda value: kernel.launch(1, 32, (Address(value),)), "u8"), (prepared.launch, "u8")):
        entered.clear()
        go_on.clear()
        driver.launches.clear()
        other = threading.Thread(target=launch, args=(1,))
        other.start()
        assert entered.wait(20)
        launch(2)
        go_on.set()
        other.join()
        assert [one["slots"][0] for one in driver.launches] == [slot(form, 2), slot(form, 1)]


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.cu").write_text('#include "b.cuh"\n#ifdef HOST\n#include "missing.h"\n#endif\nint a = B;\n')
    (folder / "b.cuh").write_text('#pragma once\n  #  include "c.cuh"\n')
    (folder / "c.cuh").write_text('#include "b.cuh"\n#define B 1\n')
    (folder / "other.cuh").write_text("unused")
    return folder


def test_a_source_comes_with_all_it_includes(sources):
    source = read_source("a.cu", sources)
    assert source.text == (sources / "a.cu").read_text()
    assert source.headers == {name: (sources / name).read_text() for name in ("b.cuh", "c.cuh")}
    with pytest.raises(UserError, match="There is no CUDA source z.cu in "):
        read_source("z.cu", sources)


def test_a_cubin_is_compiled_once_for_everything_it_depends_on(sources, tmp_path):
    calls = []

    def compiler(name, text, headers, options):
        calls.append((name, text, dict(headers), tuple(options)))
        return repr(calls[-1]).encode()

    def build(define=1, architecture="sm_86", version="12.8"):
        source = read_source("a.cu", sources)
        options = compile_options(architecture, {"Z": define, "A": 2}, ["--maxrregcount=64"])
        return cubin(source, options, version, compiler, tmp_path / "cache")

    first = build()
    assert calls[0][3] == ("-arch=sm_86", "--std=c++17", "-DA=2", "-DZ=1", "--maxrregcount=64")
    assert build() == first
    assert len(calls) == 1
    assert len({first, build(define=2), build(architecture="sm_80")}) == 3
    build(version="13.0")
    assert len(calls) == 4
    (sources / "c.cuh").write_text("#define B 2\n")
    assert build() != first
    (sources / "other.cuh").write_text("still unused")
    build()
    assert len(calls) == 5
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]])
def test_a_damaged_cubin_is_compiled_again(sources, tmp_path, damage):
    source, calls = read_source("a.cu", sources), []

    def compiler(*_):
        calls.append(1)
        return b"compiled code" * 9

    first = cubin(source, (), "1", compiler, tmp_path)
    (file,) = tmp_path.glob("*.cubin")
    file.write_bytes(damage(file.read_bytes()))
    assert cubin(source, (), "1", compiler, tmp_path) == first
    assert cubin(source, (), "1", compiler, tmp_path) == first
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_a_warning(sources, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    assert cubin(read_source("a.cu", sources), (), "1", lambda *_: b"code", tmp_path / "file") == b"code"
    assert CACHE_VARIABLE in caplog.text


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "matquant" / "cuda"


def test_without_cupy_a_sentence_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"need CuPy.*matquant\[gpu13\].*matquant\[gpu\]"):
        matquant.cuda.load("gemm.cu", "gemm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_sentence_says_so():
    pytest.importorskip("cupy")
    with pytest.raises(UserError, match="need an NVIDIA GPU, and torch sees none"):
        matquant.cuda.load("gemm.cu", "gemm")


def test_architectures_are_named_in_full():
    assert [architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [
        "sm_80",
        "sm_86",
        "sm_89",
        "sm_90a",
        "sm_120a",
    ]


@pytest.fixture
def nvrtc():
    pytest.importorskip("cupy")
    try:
        nvrtc_version()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_nvrtc_makes_a_cubin_without_a_gpu(nvrtc, sources, name):
    (sources / "k.cu").write_text('#include "c.cuh"\nextern "C" __global__ void k(int* x) { x[0] = B + C; }\n')
    source = read_source("k.cu", sources)
    binary = nvrtc_compile(source.name, source.text, source.headers, compile_options(name, {"C": 3}))
    assert binary[:4] == b"\x7fELF"
    with pytest.raises(RuntimeError, match=r'k.cu does not compile with -arch=.*(?s:.)*identifier "C" is undefined'):
        nvrtc_compile(source.name, source.text, source.headers, compile_options(name))


@pytest.mark.slow
def test_import_needs_only_torch_numpy_and_safetensors():
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cupy", "hydra", "omegaconf", "transformers", "numba", "scipy"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import matquant.inference
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
