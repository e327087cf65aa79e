# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries as pointers: NumPy, PyTorch, CuPy, JAX and whatever speaks DLPack, __array_interface__ or
__cuda_array_interface__. Nothing is copied and nothing waits for a device.

NumPy has no bfloat16 of its own: arrays of ml_dtypes.bfloat16 are taken as they are, and uint16 ones with dtype="bf16".
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._lib import InvalidArgument, InvalidType, NotSupported

Device = tuple[str, int]  # ("cpu", 0) or ("cuda", ordinal)

ITEM_BYTES = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
    "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1,
}  # fmt: skip
_NUMPY_NAMES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int8": "i8",
    "uint16": "u16", "int16": "i16", "uint32": "u32", "int32": "i32", "uint64": "u64", "int64": "i64", "bool": "bool",
}  # fmt: skip
_TYPE_NAMES = {
    **{name: name for name in ITEM_BYTES},
    **_NUMPY_NAMES, "float": "f32", "half": "f16",
}  # fmt: skip


def type_name(dtype: Any, name: str = "dtype") -> str:
    """ "f32", "f16", ... of a name or of a NumPy, ml_dtypes, PyTorch, CuPy or JAX element type."""
    text = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    text = (str(dtype) if text is None else text).rsplit(".", 1)[-1]
    if text not in _TYPE_NAMES:
        raise InvalidType(f"{name} is {dtype!r}; it must be one of f32, f16 and bf16")
    return _TYPE_NAMES[text]


class View:
    """Where an array is and what it holds; `owner` keeps it alive. Strides are in elements."""

    __slots__ = ("array_library", "device", "dtype", "owner", "pointer", "readonly", "shape", "stream", "strides")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        device: Device,
        library: str,
        owner: Any,
        readonly: bool = False,
        stream: int | None = None,
    ):
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self.array_library = library
        self.owner = owner
        self.readonly = readonly
        self.stream = stream

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


# ------------------------------------------------------------------------------------------------------ PyTorch --

_torch_names: dict[Any, str] = {}


def _torch_view(torch: Any, x: Any, name: str) -> View:
    if not _torch_names:
        for text, ours in _NUMPY_NAMES.items():
            kind = getattr(torch, text, None)
            if kind is not None:
                _torch_names[kind] = ours
    dtype = _torch_names.get(x.dtype)
    if dtype is None:
        raise InvalidType(f"{name} is a tensor of {x.dtype}, which no argument takes")
    device = x.device
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"{name} is on device {device}; only cpu and cuda tensors can be used")
    if x.layout != torch.strided:
        raise InvalidArgument(f"{name} is a tensor of layout {x.layout}; it must be strided")
    try:
        pointer = x.data_ptr()
    except RuntimeError as error:
        raise InvalidArgument(f"{name} has no memory: {error}") from error
    view = View(pointer, tuple(x.shape), x.stride(), dtype, (device.type, device.index or 0), "torch", x)
    if pointer == 0 and view.size > 0:
        raise InvalidArgument(f"{name} is a tensor whose memory was freed")
    return view


# ------------------------------------------------------------------------------------------------------- DLPack --


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_READ_ONLY = 1
_JAX = ("jax", "jaxlib")  # where JAX's arrays come from; they are read-only
_DL_TYPES = {
    (0, 8): "i8", (0, 16): "i16", (0, 32): "i32", (0, 64): "i64",
    (1, 8): "u8", (1, 16): "u16", (1, 32): "u32", (1, 64): "u64",
    (2, 16): "f16", (2, 32): "f32", (2, 64): "f64", (4, 16): "bf16", (6, 8): "bool",
}  # fmt: skip

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = ctypes.c_void_p
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is.restype = ctypes.c_int


def _dlpack_view(x: Any, name: str, stream: int | None) -> View:
    kind, ordinal = x.__dlpack_device__()
    if kind in (_DL_CPU, _DL_CUDA_HOST):
        device, request = ("cpu", 0), {}
    elif kind in (_DL_CUDA, _DL_CUDA_MANAGED):
        # The producer makes this stream wait for the array; 1 is the legacy default stream.
        device, request = ("cuda", int(ordinal)), {"stream": stream or 1}
    else:
        raise InvalidArgument(f"{name} is on DLPack device {int(kind)}; only CPU and CUDA memory can be used")
    try:
        try:
            capsule = x.__dlpack__(max_version=(1, 0), copy=False, **request)
        except TypeError:  # a producer before DLPack 1.0
            capsule = x.__dlpack__(**request)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise InvalidArgument(f"{name} could not be exported by DLPack: {error}") from error
    # The capsule is never renamed: whoever drops it last lets it delete the tensor.
    readonly = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        versioned = _DLVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise InvalidArgument(f"{name} was exported by DLPack {versioned.major}.{versioned.minor}; 1 is known")
        tensor, readonly = versioned.tensor, bool(versioned.flags & _DL_READ_ONLY)
    elif _capsule_is(capsule, b"dltensor"):
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise InvalidType(f"{name}.__dlpack__() returned no DLPack capsule")
    dtype = _DL_TYPES.get((tensor.dtype.code, tensor.dtype.bits)) if tensor.dtype.lanes == 1 else None
    if dtype is None:
        raise InvalidType(
            f"{name} has DLPack type code {tensor.dtype.code} of {tensor.dtype.bits} bits, which no argument takes"
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _packed(shape)
    library = type(x).__module__.partition(".")[0]
    readonly |= library in _JAX  # whether the capsule says so or not
    pointer = (tensor.data or 0) + tensor.byte_offset
    return View(pointer, shape, strides, dtype, device, library, (x, capsule), readonly)


# --------------------------------------------------------------------------------------------- array interfaces --


def _interface_view(interface: dict[str, Any], device: Device, library: str, x: Any, name: str) -> View:
    typestr = interface["typestr"]
    if typestr[0] == ">":
        raise InvalidType(f"{name} is big-endian ({typestr})")
    dtype_name = getattr(getattr(x, "dtype", None), "name", None)
    try:
        dtype = _NUMPY_NAMES.get(dtype_name or np.dtype(typestr).name)
    except TypeError:
        dtype = None
    if dtype is None:
        raise InvalidType(f"{name} holds elements of type {dtype_name or typestr}, which no argument takes")
    if interface.get("mask") is not None:
        raise InvalidArgument(f"{name} is a masked array")
    shape = tuple(interface["shape"])
    data = interface.get("data")
    if data is None or data[0] is None:
        raise InvalidArgument(f"{name} has no memory")
    item = ITEM_BYTES[dtype]
    strides = interface.get("strides")
    if strides is None:
        strides = _packed(shape)
    else:
        if any(s % item for s, n in zip(strides, shape, strict=True) if n > 1):
            raise InvalidArgument(
                f"{name} has strides of {tuple(strides)} bytes, no multiples of its {item}-byte elements"
            )
        strides = tuple(s // item for s in strides)
    stream = interface.get("stream")
    view = View(int(data[0]), shape, strides, dtype, device, library, x, bool(data[1]), stream)
    if view.pointer == 0 and view.size > 0:
        raise InvalidArgument(f"{name} is an array whose memory was freed")
    return view


_numpy_types: dict[Any, str] = {}


def _numpy_view(x: np.ndarray[Any, Any], name: str) -> View:
    dtype = _numpy_types.get(x.dtype)
    if dtype is None or type(x) is not np.ndarray:  # masked arrays, and what is refused
        found = _interface_view(x.__array_interface__, ("cpu", 0), "numpy", x, name)
        if not isinstance(x, np.ma.MaskedArray):
            _numpy_types[x.dtype] = found.dtype
            return found
        raise InvalidArgument(f"{name} is a masked array")
    item, strides = ITEM_BYTES[dtype], x.strides
    if item > 1:
        for s, n in zip(strides, x.shape, strict=True):
            if s % item and n > 1:
                raise InvalidArgument(
                    f"{name} has strides of {strides} bytes, no multiples of its {item}-byte elements"
                )
        strides = tuple(s // item for s in strides)
    return View(
        x.__array_interface__["data"][0], x.shape, strides, dtype, ("cpu", 0), "numpy", x, not x.flags.writeable
    )


def _cuda_ordinal(x: Any) -> int:
    device = getattr(x, "device", None)
    ordinal = getattr(device, "id", None)
    return ordinal if isinstance(ordinal, int) else 0


def view(x: Any, name: str, dtype: str | None = None, stream: int | None = None) -> View:
    """Looks at an array. `dtype` says what 16-bit integers hold; `stream` is the one that will read the array."""
    torch = sys.modules.get("torch")
    if isinstance(x, np.ndarray):
        found = _numpy_view(x, name)
    elif torch is not None and isinstance(x, torch.Tensor):
        found = _torch_view(torch, x, name)
    else:
        library = type(x).__module__.partition(".")[0]
        # Half of DLPack's producers speak an interface as well; DLPack knows bf16, waits for the right stream and tells
        # the device, so it comes first. CuPy's own stream is current anyway.
        if library == "cupy" and hasattr(x, "__cuda_array_interface__"):
            found = _interface_view(x.__cuda_array_interface__, ("cuda", _cuda_ordinal(x)), library, x, name)
        elif hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
            found = _dlpack_view(x, name, stream)
        elif hasattr(x, "__cuda_array_interface__"):
            found = _interface_view(x.__cuda_array_interface__, ("cuda", _cuda_ordinal(x)), library, x, name)
        elif hasattr(x, "__array_interface__"):
            found = _interface_view(x.__array_interface__, ("cpu", 0), library, x, name)
        else:
            raise InvalidType(
                f"{name} is a {type(x).__name__}; it must be an array: NumPy's, PyTorch's, CuPy's, JAX's, or one with"
                " DLPack or an array interface"
            )
    if dtype is not None and found.dtype != dtype:
        if dtype not in ("f16", "bf16") or found.dtype not in ("u16", "i16"):
            raise InvalidType(f"{name} is {found.dtype}, not {dtype}")
        found.dtype = dtype
    return found


def array(
    x: Any,
    name: str,
    device: Device,
    dtypes: Sequence[str],
    *,
    dtype: str | None = None,
    shape: Sequence[int | None] | None = None,
    writable: bool = False,
    stream: int | None = None,
) -> View:
    """Looks at an array and checks where it is, what it holds, its shape (None: any extent), and its strides: positive
    (the library takes 0 for packed), the last dimension adjacent."""
    found = view(x, name, dtype, stream)
    if found.device != device:
        raise InvalidArgument(f"{name} is on {device_name(found.device)}, the codec on {device_name(device)}")
    if found.dtype not in dtypes:
        hint = '; say dtype="bf16" or "f16" if that is what it holds' if found.dtype in ("u16", "i16") else ""
        raise InvalidType(f"{name} is {found.dtype}; it must be {' or '.join(dtypes)}{hint}")
    if writable and found.readonly:
        raise InvalidArgument(f"{name} is read-only; it is written to")
    fits = shape is None or len(shape) == len(found.shape)
    if fits and shape is not None:
        for want, has in zip(shape, found.shape, strict=True):
            if want is not None and want != has:
                fits = False
    if shape is not None and not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise InvalidArgument(f"{name} has shape {list(found.shape)}; it must be [{wanted}]")
    packed = _packed(found.shape)
    if found.strides != packed:
        if 0 not in found.shape:
            # The stride of a dimension of one element says nothing.
            packed = tuple(p if n == 1 else s for s, p, n in zip(found.strides, packed, found.shape, strict=True))
            if min(packed) <= 0:
                raise InvalidArgument(f"{name} has strides {list(found.strides)}; they must be above zero")
            if packed[-1] != 1:
                raise InvalidArgument(f"{name} has a last stride of {packed[-1]} elements; it must be 1")
        found.strides = packed
    return found


def is_packed(found: View) -> bool:
    return found.strides == _packed(found.shape)


def packed(found: View, name: str) -> View:
    if not is_packed(found):
        raise InvalidArgument(f"{name} has strides {list(found.strides)}; it must be densely packed")
    return found


def flat_rows(found: View, name: str, trailing: int) -> tuple[int, int]:
    """Count and stride of an array's leading dimensions seen as one, or an exception where they are no such thing."""
    leading = len(found.shape) - trailing
    count = math.prod(found.shape[:leading])
    step = 0
    for extent, stride in zip(reversed(found.shape[:leading]), reversed(found.strides[:leading]), strict=True):
        if extent == 1:
            continue
        if step and stride != step:
            raise InvalidArgument(
                f"{name} has strides {list(found.strides)}; its leading dimensions must be one run of rows"
            )
        step = stride * extent
    for extent, stride in zip(reversed(found.shape[:leading]), reversed(found.strides[:leading]), strict=True):
        if extent > 1:
            return count, stride
    return count, math.prod(found.shape[leading:])


def device_name(device: Device) -> str:
    return "the CPU" if device[0] == "cpu" else f"CUDA device {device[1]}"


def signature(x: Any) -> Any:
    """What an array of NumPy or PyTorch is but for where it lies: arrays of one signature pass the same checks. None for
    others."""
    kind = type(x)
    if kind is np.ndarray:
        return x.shape, x.strides, x.dtype, x.flags.writeable
    torch = sys.modules.get("torch")
    if torch is not None and kind is torch.Tensor and x.layout is torch.strided:
        return x.shape, x.stride(), x.dtype, x.device
    return None


def pointer(x: Any, name: str) -> int:
    """Where an array that has a signature begins."""
    where: int = x.__array_interface__["data"][0] if type(x) is np.ndarray else x.data_ptr()
    if where == 0 and 0 not in x.shape:
        raise InvalidArgument(f"{name} is a tensor whose memory was freed")
    return where


# ------------------------------------------------------------------------------------------------------ streams --


def stream_handle(stream: Any) -> int:
    """The cudaStream_t of an integer, or of PyTorch's, CuPy's or any other stream object."""
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        value = getattr(stream, attribute, None)
        if isinstance(value, int):
            return value
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    raise InvalidType(f"stream is a {type(stream).__name__}; it must be an integer or a stream of PyTorch or CuPy")


_raw_stream: Any = None


def torch_stream(ordinal: int) -> int:
    """PyTorch's current stream."""
    global _raw_stream
    if _raw_stream is None:
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a tenth of the public function's time
        _raw_stream = raw or (lambda index: torch.cuda.current_stream(index).cuda_stream)
    return int(_raw_stream(ordinal))


def current_stream(device: Device, stream: Any, *arrays: Any) -> int:
    """The stream to launch on: the given one, else the current one of the arrays' library."""
    if device[0] == "cpu":
        return 0
    if stream is not None:
        return stream_handle(stream)
    for x in arrays:
        if x is None:
            continue
        library = type(x).__module__.partition(".")[0]
        torch = sys.modules.get("torch")
        if library == "torch" or (torch is not None and isinstance(x, torch.Tensor)):
            return torch_stream(device[1])
        if library == "cupy":
            return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    for x in arrays:
        if type(x).__module__.partition(".")[0] in _JAX:  # DLPack made the default stream wait
            continue
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is not None and interface.get("stream") is not None:
            return int(interface["stream"])
    return 0


# --------------------------------------------------------------------------------------------------- allocation --

_ALIGNMENT = 256  # what workspaces need; pages need 16


class Library:
    """Makes arrays of one array library on one device."""

    name = ""

    def __init__(self, device: Device):
        self.device = device

    def empty(self, shape: Sequence[int], dtype: str, stream: int | None = None) -> Any:
        """An uninitialised, densely packed array, aligned to 256 bytes, first used on `stream` (None: the current one).
        Where memory is given out in the order of a stream, it is this stream's."""
        raise NotImplementedError

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        raise NotImplementedError

    def upload(self, destination: Any, host: np.ndarray[Any, Any]) -> None:
        """Copies host memory, free to be changed on return, into a u8 array on the current stream."""
        raise NotImplementedError

    def reinterpret(self, array: Any, first: int, shape: Sequence[int], dtype: str) -> Any:
        """Part of a u8 array, from byte `first` on, as an array of another type."""
        raise NotImplementedError

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        """A copy in host memory; waits for the device."""
        raise NotImplementedError

    def stream(self) -> int:
        """The current stream."""
        return 0


class NumpyLibrary(Library):
    name = "numpy"

    def __init__(self, device: Device):
        if device[0] != "cpu":
            raise NotSupported("NumPy has no arrays on CUDA devices: install PyTorch or CuPy")
        super().__init__(device)

    @staticmethod
    def _dtype(dtype: str) -> Any:
        if dtype == "bf16":
            try:
                return importlib.import_module("ml_dtypes").bfloat16
            except ImportError:
                return np.uint16
        return {ours: text for text, ours in _NUMPY_NAMES.items()}[dtype]

    def empty(self, shape: Sequence[int], dtype: str, stream: int | None = None) -> Any:
        count = math.prod(shape) * ITEM_BYTES[dtype]
        memory = np.empty(count + _ALIGNMENT, np.uint8)
        skip = -memory.ctypes.data % _ALIGNMENT
        return memory[skip : skip + count].view(self._dtype(dtype)).reshape(tuple(shape))

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        count = math.prod(shape) * ITEM_BYTES[dtype]
        memory = np.zeros(count + _ALIGNMENT, np.uint8)
        skip = -memory.ctypes.data % _ALIGNMENT
        return memory[skip : skip + count].view(self._dtype(dtype)).reshape(tuple(shape))

    def upload(self, destination: Any, host: np.ndarray[Any, Any]) -> None:
        destination[...] = host

    def reinterpret(self, array: Any, first: int, shape: Sequence[int], dtype: str) -> Any:
        count = math.prod(shape) * ITEM_BYTES[dtype]
        return array[first : first + count].view(self._dtype(dtype)).reshape(tuple(shape))

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        return np.array(array)


class TorchLibrary(Library):
    name = "torch"

    def __init__(self, device: Device):
        super().__init__(device)
        self.torch = importlib.import_module("torch")
        self._torch_device = "cpu" if device[0] == "cpu" else f"cuda:{device[1]}"
        self._dtypes = {
            ours: getattr(self.torch, text) for text, ours in _NUMPY_NAMES.items() if hasattr(self.torch, text)
        }

    def empty(self, shape: Sequence[int], dtype: str, stream: int | None = None) -> Any:
        torch = self.torch
        if self.device[0] != "cpu":  # the caching allocator's blocks are aligned to 512
            if stream is not None and stream != torch_stream(self.device[1]):
                with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self._torch_device)):
                    return torch.empty(tuple(shape), dtype=self._dtypes[dtype], device=self._torch_device)
            return torch.empty(tuple(shape), dtype=self._dtypes[dtype], device=self._torch_device)
        count = math.prod(shape) * ITEM_BYTES[dtype]
        memory = torch.empty(count + _ALIGNMENT, dtype=torch.uint8)
        skip = -memory.data_ptr() % _ALIGNMENT
        return memory[skip : skip + count].view(self._dtypes[dtype]).reshape(tuple(shape))

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        return self.empty(shape, dtype).zero_()

    def upload(self, destination: Any, host: np.ndarray[Any, Any]) -> None:
        torch = self.torch
        if self.device[0] == "cpu":
            destination.copy_(torch.from_numpy(host))
            return
        # Page-locked memory of PyTorch's own cache, which waits for the copy before it hands the memory out again.
        staging = torch.empty(host.shape, dtype=torch.uint8, pin_memory=True)
        staging.numpy()[...] = host
        destination.copy_(staging, non_blocking=True)

    def reinterpret(self, array: Any, first: int, shape: Sequence[int], dtype: str) -> Any:
        count = math.prod(shape) * ITEM_BYTES[dtype]
        return array[first : first + count].view(self._dtypes[dtype]).reshape(tuple(shape))

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        if array.dtype == self.torch.bfloat16:
            array = array.float()
        result: np.ndarray[Any, Any] = array.cpu().numpy().copy()
        return result

    def stream(self) -> int:
        return 0 if self.device[0] == "cpu" else torch_stream(self.device[1])


class CupyLibrary(Library):
    name = "cupy"

    def __init__(self, device: Device):
        if device[0] != "cuda":
            raise NotSupported("CuPy has no arrays in host memory: use NumPy or PyTorch")
        super().__init__(device)
        self.cupy = importlib.import_module("cupy")

    def _dtype(self, dtype: str) -> Any:
        return NumpyLibrary._dtype(dtype)

    def empty(self, shape: Sequence[int], dtype: str, stream: int | None = None) -> Any:  # its pool aligns to 512
        with self.cupy.cuda.Device(self.device[1]):
            if stream is not None and stream != self.stream():
                with self.cupy.cuda.ExternalStream(stream, self.device[1]):
                    return self.cupy.empty(tuple(shape), dtype=self._dtype(dtype))
            return self.cupy.empty(tuple(shape), dtype=self._dtype(dtype))

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        with self.cupy.cuda.Device(self.device[1]):
            return self.cupy.zeros(tuple(shape), dtype=self._dtype(dtype))

    def upload(self, destination: Any, host: np.ndarray[Any, Any]) -> None:
        with self.cupy.cuda.Device(self.device[1]):
            destination.set(np.ascontiguousarray(host), stream=self.cupy.cuda.get_current_stream())

    def reinterpret(self, array: Any, first: int, shape: Sequence[int], dtype: str) -> Any:
        count = math.prod(shape) * ITEM_BYTES[dtype]
        return array[first : first + count].view(self._dtype(dtype)).reshape(tuple(shape))

    def to_numpy(self, array: Any) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = array.get()
        return result

    def stream(self) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)


_LIBRARIES: dict[str, type[Library]] = {"numpy": NumpyLibrary, "torch": TorchLibrary, "cupy": CupyLibrary}
_made: dict[tuple[str, Device], Library] = {}


def array_library(name: str | None, device: Device) -> Library:
    """The array library to allocate with. None: NumPy on the CPU; PyTorch, else CuPy, on a CUDA device."""
    if name is None:
        if device[0] == "cpu":
            name = "numpy"
        else:
            name = next((n for n in ("torch", "cupy") if n in sys.modules or importlib.util.find_spec(n)), "torch")
    if name not in _LIBRARIES:
        raise InvalidArgument(f"library is {name!r}; it must be one of {', '.join(_LIBRARIES)}")
    key = (name, device)
    if key not in _made:
        _made[key] = _LIBRARIES[name](device)
    return _made[key]


def array_library_of(found: View, device: Device) -> Library:
    """The library to allocate outputs with: that of an input where it can be."""
    if found.array_library == "torch" or (found.array_library == "cupy" and device[0] == "cuda"):
        return array_library(found.array_library, device)
    return array_library(None, device)
