"""Kernel arguments in the form of ``cuLaunchKernel``: an array with the address of each argument's value."""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

_SLOT = 8  # bytes for one argument, or several such slots for a structure
_SCALARS = "?bBhHiIlLqQefd"  # format characters of ``struct`` for scalar arguments


class Address(int):
    """Address of device memory as a kernel argument, like a tensor; the caller keeps the memory allocated."""


class Signature:
    """Types of a kernel's arguments, from those of its first launch.

    A tensor, an ``Address`` or None is an address, int an int32, float a float32, bytes a structure; ctypes and numpy scalars
    keep their type.

    Raises:
        TypeError: an argument has another type.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        forms = [f"{len(arg)}s" if isinstance(arg, bytes) else _form(type(arg)) for arg in args]
        self.layout = struct.Struct("@" + "".join(f"{form}{-struct.calcsize(form) % _SLOT}x" for form in forms))
        sizes = [-(-struct.calcsize(form) // _SLOT) * _SLOT for form in forms]
        self.offsets = list(itertools.accumulate(sizes, initial=0))[:-1]
        self.pointers = [i for i, form in enumerate(forms) if form == "P"]
        self.boxed = [i for i, arg in enumerate(args) if isinstance(arg, ctypes._SimpleCData)]


class Frame:
    """Memory for the arguments of one launch at a time: a slot per value, and the array of slot addresses.

    Attributes:
        address: of the array of slot addresses.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._slots = ctypes.create_string_buffer(max(signature.layout.size, 1))
        start = ctypes.addressof(self._slots)
        addresses = [start + offset for offset in signature.offsets]
        self._addresses = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        self.address = ctypes.addressof(self._addresses)

    def overwrite(self, first: int, layout: struct.Struct, *addresses: int) -> None:
        """Write addresses to consecutive slots.

        Args:
            first: index of the first argument among them; they have addresses as arguments.
            layout: as many addresses, "P" each.
        """
        layout.pack_into(self._slots, self._signature.offsets[first], *addresses)

    def write(self, args: Sequence[Any], device: int) -> None:
        """Write the values of the next launch to the slots.

        Args:
            device: index of the CUDA device that tensors must be on.

        Raises:
            ValueError: a tensor is on another device.
            TypeError: the arguments do not match the signature.
        """
        values = list(args)
        try:
            for i in self._signature.pointers:
                tensor = values[i]
                if tensor is None:
                    values[i] = 0
                elif type(tensor) is Address:
                    continue
                elif tensor.get_device() == device:
                    values[i] = tensor.data_ptr()
                else:
                    raise ValueError(f"A tensor on {tensor.device} was passed to a kernel on cuda:{device}.")
            for i in self._signature.boxed:
                values[i] = values[i].value
            self._signature.layout.pack_into(self._slots, 0, *values)
        except (struct.error, OverflowError, AttributeError, IndexError) as error:
            found = ", ".join("None" if arg is None else type(arg).__name__ for arg in args)
            raise TypeError(
                f"The kernel's arguments do not fit those of its first launch: {error}. They are {found}."
            ) from error


def _form(type_: type) -> str:
    """Format of a value in its slot, in the notation of ``struct``; "P" is an address."""
    if issubclass(type_, Tensor | Address | type(None)):
        return "P"
    if type_ in (int, float):
        return "i" if type_ is int else "f"
    if issubclass(type_, np.generic) and np.dtype(type_).char in _SCALARS:
        return np.dtype(type_).char
    if issubclass(type_, ctypes._SimpleCData) and type_._type_ in _SCALARS:  # type: ignore[attr-defined]
        character: str = type_._type_  # type: ignore[attr-defined]
        return character
    raise TypeError(
        f"A kernel takes tensors, None, int, float, bytes, and ctypes or numpy scalars as arguments, not {type_.__name__}."
    )
