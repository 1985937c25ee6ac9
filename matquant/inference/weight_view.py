"""Weight of a nested layer for code that reads ``layer.weight``: metadata at once, values when an operator needs them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from matquant.errors import UserError


class WeightView(Tensor):
    """Read-only tensor [out_features, in_features] without storage.

    Device, dtype and shape cost nothing. An operator on it dequantizes the whole weight first.

    Args:
        shape: of the weight.
        dequantize: function that computes the dense weight.
    """

    _dequantize: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, dequantize: Callable[[], Tensor]
    ) -> "WeightView":
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._dequantize = dequantize
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable:
            raise UserError(
                f"The weight of a nested layer cannot be changed ({func}). Change the original model, and quantize it again."
            )

        def dense(value: Any) -> Any:
            return value._dequantize() if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightView({list(self.shape)}, dtype={self.dtype}, device={self.device})"
