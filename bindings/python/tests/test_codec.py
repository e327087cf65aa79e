# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import tqkv


class OnlyDlpack:
    """An array that speaks DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldDlpack(OnlyDlpack):
    """The same before DLPack 1.0: no options, no read-only flag."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


class OnlyInterface:
    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.array = array


@pytest.fixture(scope="module")
def codec():
    return tqkv.Codec("k4v3", head_dim=64, kv_heads=2)


def test_info(codec):
    assert (codec.info.k.bits, codec.info.v.bits) == (4, 3) == tqkv.presets()["k4v3"]
    assert codec.info.k.code_bytes == 32 and codec.info.k.scale_bytes == 2
    assert codec.bytes_per_token == 2 * (32 + 2 + 24 + 2)
    assert codec.bytes(10) == 10 * 16 * codec.bytes_per_token
    assert codec.fingerprint == codec.layout().fingerprint != codec.layout("exact").fingerprint
    assert codec.fingerprint == tqkv.Codec(k_bits=4, v_bits=3, head_dim=64, kv_heads=2).fingerprint
    assert codec.fingerprint != tqkv.Codec("k4v3", head_dim=64, kv_heads=2, seed=1).fingerprint
    assert codec.info.k.levels == tuple(sorted(codec.info.k.levels)) and len(codec.info.k.levels) == 16
    assert "k4v3" in repr(codec)


def test_encode_decode(codec, random):
    x = random.standard_normal((60, 5, 64)).astype(np.float32)
    for side, bits in (("k", 4), ("v", 3)):
        codes, scales = codec.encode(x, side)
        assert codes.shape == (60, 5, 8 * bits) and codes.dtype == np.uint8
        assert scales.shape == (60, 5) and scales.dtype == np.float16
        y = codec.decode(codes, scales, side)
        assert y.dtype == np.float32 and y.shape == x.shape
        error = np.sum((x - y) ** 2) / np.sum(x**2)
        # The mean of 19200 squared errors, each with a deviation of about itself, is within 1% of that of many; the bound
        # is Theorem 1's, 20% above that at 4 bits and more at 3.
        assert error < 2.72 * 4.0**-bits
        for dtype in ("f16", "bf16", np.float16):
            rounded = codec.decode(codes, scales, side, dtype=dtype).astype(np.float32)
            assert np.all(np.abs(rounded - y) <= 2**-8 * np.abs(y))


@pytest.mark.parametrize("wrap", [OnlyDlpack, OldDlpack, OnlyInterface, np.asarray])
def test_every_way_in_gives_the_same_bytes(codec, random, wrap):
    x = random.standard_normal((4, 7, 64)).astype(np.float32)
    expected = codec.encode(x)
    codes, scales = codec.encode(wrap(x))
    assert codes.tobytes() == expected[0].tobytes() and scales.tobytes() == expected[1].tobytes()


def test_strided_rows_and_given_outputs(codec, random):
    wide = random.standard_normal((6, 3, 64)).astype(np.float32)
    rows = wide[:, 1]
    expected = codec.encode(np.ascontiguousarray(rows))
    codes, scales = np.full((6, 50), 77, np.uint8), np.zeros(6, np.float16)
    got = codec.encode(rows, codes=codes[:, :32], scales=scales)
    assert got[0].base is codes and got[1] is scales
    assert codes[:, :32].tobytes() == expected[0].tobytes() and scales.tobytes() == expected[1].tobytes()
    assert np.all(codes[:, 32:] == 77)
    out = np.full((6, 3, 64), 5.0, np.float32)
    codec.decode(codes[:, :32], scales, out=out[:, 2])
    assert np.all(out[:, :2] == 5) and np.array_equal(out[:, 2], codec.decode(*expected))


def test_bf16_of_numpy(codec, random):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = random.standard_normal((9, 64)).astype(ml_dtypes.bfloat16)
    codes, scales = codec.encode(x)
    assert codes.tobytes() == codec.encode(x.view(np.uint16), dtype="bf16")[0].tobytes()
    assert codes.tobytes() == codec.encode(x.astype(np.float32))[0].tobytes()
    assert codec.decode(codes, scales, dtype="bf16").dtype == ml_dtypes.bfloat16
    with pytest.raises(tqkv.InvalidType, match=r"x is u16.*dtype=\"bf16\""):
        codec.encode(x.view(np.uint16))


def test_jax(codec):
    jax = pytest.importorskip("jax")
    x = jax.device_put(jax.random.normal(jax.random.key(0), (70, 64), dtype="bfloat16"), jax.devices("cpu")[0])
    codes, scales = codec.encode(x)
    assert codes.tobytes() == codec.encode(np.asarray(x))[0].tobytes()
    with pytest.raises(tqkv.InvalidArgument, match="out is read-only"):
        codec.decode(codes, scales, out=x)


def test_raw_sides_have_no_scales(random):
    codec = tqkv.Codec("raw", head_dim=32, raw_type="f16")
    x = random.standard_normal((5, 32)).astype(np.float16)
    codes, scales = codec.encode(x)
    assert scales is None and np.array_equal(codec.decode(codes, dtype="f16"), x)
    with pytest.raises(tqkv.InvalidArgument, match="scales is given"):
        codec.encode(x, scales=np.zeros(5, np.float16))


def test_options_of_one_side(random):
    levels = np.array([-2.0, -0.5, 0.5, 2.0], np.float32)
    matrix = np.linalg.qr(random.standard_normal((16, 16)))[0].astype(np.float32)
    codec = tqkv.Codec(
        head_dim=16, k={"bits": 2, "levels": levels}, v={"bits": 3, "matrix": matrix, "scale_type": "f32"}
    )
    assert (codec.info.k.codebook, codec.info.v.rotation) == ("custom", "custom")
    assert codec.info.v.scale_type == "f32"
    assert codec.encode(np.zeros((2, 16), np.float32), "v")[1].dtype == np.float32
    with pytest.raises(tqkv.InvalidArgument, match="k has an unknown option 'bit'"):
        tqkv.Codec(head_dim=16, k={"bit": 2})


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"head_dim": 24}, tqkv.InvalidArgument, "24"),
        ({"preset": "k9v9"}, tqkv.InvalidArgument, "k9v9"),
        ({"rotation": "spin"}, tqkv.InvalidArgument, "'spin'"),
        ({"device": "tpu"}, tqkv.InvalidArgument, "'tpu'"),
        ({"device": "cuda:99"}, (tqkv.NoDevice, tqkv.NotSupported), "."),
        ({"k_bits": 5}, tqkv.InvalidArgument, "5"),
        ({"block_size": 17}, tqkv.InvalidArgument, "17"),
        ({"raw_type": "f32"}, tqkv.TqError, "raw_type"),
        ({"raw_type": "complex64"}, tqkv.InvalidType, "complex64"),
    ],
)
def test_refused_codecs(options, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        tqkv.Codec(**{"head_dim": 64, **options})
    assert isinstance(caught.value, tqkv.TqError) and caught.value.status != 0


def test_refused_arrays(codec, random):
    x = random.standard_normal((4, 64)).astype(np.float32)
    codes, scales = codec.encode(x)
    locked = np.zeros((4, 32), np.uint8)
    locked.flags.writeable = False
    cases = [
        (lambda: codec.encode([1.0, 2.0]), tqkv.InvalidType, "x is a list"),
        (lambda: codec.encode(x.astype(np.float64)), tqkv.InvalidType, "x is f64"),
        (lambda: codec.encode(x.astype(">f4")), tqkv.InvalidType, "x is big-endian"),
        (lambda: codec.encode(x.astype(np.complex64)), tqkv.InvalidType, "x holds elements of type complex64"),
        (lambda: codec.encode(x[:, :48]), tqkv.InvalidArgument, r"x has shape \[4, 48\].*head_dim, 64"),
        (lambda: codec.encode(x[:, ::-1]), tqkv.InvalidArgument, "x has strides"),
        (lambda: codec.encode(np.asfortranarray(x)), tqkv.InvalidArgument, "x has a last stride"),
        (lambda: codec.encode(np.broadcast_to(x[:1], (4, 64))), tqkv.InvalidArgument, "x has strides"),
        (lambda: codec.encode(x, "q"), tqkv.InvalidArgument, "side is 'q'"),
        (lambda: codec.encode(x, codes=locked), tqkv.InvalidArgument, "codes is read-only"),
        (
            lambda: codec.encode(x, codes=OnlyDlpack(np.zeros((3, 32), np.uint8))),
            tqkv.InvalidArgument,
            "codes has shape",
        ),
        (lambda: codec.encode(x, codes=np.zeros((4, 32), np.int8)), tqkv.InvalidType, "codes is i8"),
        (lambda: codec.decode(codes), tqkv.InvalidArgument, "scales is None"),
        (lambda: codec.decode(codes, scales[:3]), tqkv.InvalidArgument, r"scales has shape \[3\]"),
        (lambda: codec.decode(codes, scales.astype(np.float32)), tqkv.InvalidType, "scales is f32"),
        (lambda: codec.decode(codes, scales, out=x[:3]), tqkv.InvalidArgument, "out has shape"),
        (lambda: codec.decode(codes, scales, dtype="i32"), tqkv.InvalidType, "."),
        (lambda: codec.encode(x, stream="main"), tqkv.InvalidType, "."),
    ]
    for call, kind, sentence in cases[:-1]:
        with pytest.raises(kind, match=sentence):
            call()
    # Misaligned memory is the library's own refusal.
    bytes_ = np.zeros(4 * 64 * 4 + 1, np.uint8)
    with pytest.raises(tqkv.InvalidArgument, match="aligned") as caught:
        codec.encode(bytes_[1:].view(np.float32).reshape(4, 64))
    assert caught.value.status == 3


def test_faults(codec, random):
    x = random.standard_normal((6, 64)).astype(np.float32)
    x[3, 5], x[4] = np.nan, 1e38
    faults = codec.new_faults()
    codes, scales = codec.encode(x, faults=faults)
    counts = faults.read()
    assert (counts.first_kind, counts.first_index, counts.non_finite, counts.range) == ("non_finite", 3, 1, 1)
    assert np.all(codec.decode(codes, scales)[3] == 0)
    with pytest.raises(tqkv.InvalidArgument, match="non_finite fault at index 3"):
        faults.check()
    faults.clear()
    faults.check()


def test_empty_and_single(codec):
    codes, scales = codec.encode(np.zeros((0, 64), np.float32))
    assert codes.shape == (0, 32) and scales.shape == (0,)
    codes, scales = codec.encode(np.ones(64, np.float32))
    assert codes.shape == (32,) and scales.shape == ()
    assert codec.decode(codes, scales).shape == (64,)


def test_life():
    codec = tqkv.Codec(head_dim=16)
    codec.close()
    codec.close()
    with pytest.raises(tqkv.InvalidArgument, match="closed"):
        codec.encode(np.zeros((1, 16), np.float32))
    with tqkv.Codec(head_dim=16) as codec:
        reference = weakref.ref(codec)
    del codec
    gc.collect()
    assert reference() is None


def test_inputs_are_not_kept(codec):
    class Array(np.ndarray):
        pass

    x = np.zeros((2, 64), np.float32).view(Array)
    gone = weakref.ref(x)
    codec.encode(x)
    del x
    gc.collect()
    assert gone() is None


def test_merge(codec, random):
    states = random.standard_normal((3, 4, 2, 64)).astype(np.float32)
    lse = random.standard_normal((3, 4, 2)).astype(np.float32)
    out, total = codec.merge(states, lse)
    weights = np.exp(lse.astype(np.float64))
    expected = np.sum(weights[..., None] * states, 0) / np.sum(weights, 0)[..., None]
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(total, np.log(np.sum(weights, 0)), rtol=1e-5, atol=1e-6)


def test_library():
    build = tqkv.build_info()
    assert build.abi_version == 1 and build.path == tqkv.loaded_path()
    assert tqkv.device_count("cpu") == 1 and tqkv.device_count("cuda") >= 0
    assert tqkv.presets()["safe"] == (4, 4)


def test_a_library_that_is_not_there(tmp_path):
    import subprocess
    import sys

    program = "import tqkv\ntry: tqkv.presets()\nexcept tqkv.LibraryNotFound as e: print('refused:', e)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"TQKV_LIBRARY": str(tmp_path / "none.so"), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "refused:" in result.stdout and "none.so" in result.stdout, result
