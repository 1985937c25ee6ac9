"""Rotation of the residual stream, fused into the weights (R1 of SpinQuant, arXiv 2405.16406).

With an orthogonal matrix Q and x' = x Q for every hidden state x (a row) of the residual stream:

    embeddings             E' = E Q
    RMSNorm with gain g    weight set to a gain of 1; the norm of x' equals that of x
    layers that read       y = (x o g) W^T    W' = W diag(g) Q
    layers that write      x += u W^T + b     W' = Q^T W,  b' = Q^T b
    head                   reads: W' = W diag(g) Q; a head tied to the embeddings becomes a parameter of its own

All other activations, and the logits, stay the same. Outliers of single channels of the residual stream are spread over
all channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.models.materializer import TensorFunction
from matquant.models.tensor_swap import named_tensors, swapped_tensors
from matquant.transforms.base import WeightTransform
from matquant.transforms.config import TransformConfig
from matquant.transforms.orthogonal import ORTHOGONAL_MATRICES, matrix_sha256
from matquant.transforms.residual_stream import ResidualStream, trace_residual_stream, unsupported

_ELEMENTS_AT_ONCE = 2**24  # of a matrix whose rows are rotated, to limit the float32 copies of large embeddings

# Largest error of a rotated block's output, relative to the change that the block makes to the hidden states. A float32
# block that the rotation fits has about 1e-5.
_MAX_ERROR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationConfig(TransformConfig):
    """Settings of the rotation.

    Attributes:
        matrix: hadamard, randomized and equal on every machine; or orthogonal, uniformly distributed.
        seed: of the matrix.
    """

    name: str = "rotation"
    matrix: Literal["hadamard", "orthogonal"] = "hadamard"
    seed: int = 0

    def build(self, model: Any) -> "ResidualRotation":
        return ResidualRotation(model.config.get_text_config().hidden_size, matrix=self.matrix, seed=self.seed)


class ResidualRotation(WeightTransform):
    """Fused rotation of the residual stream.

    Args:
        hidden_size: of the model.
        matrix: key in ``ORTHOGONAL_MATRICES``.
        seed: of the matrix.

    Raises:
        UserError: no Hadamard matrix of this size is known.
    """

    name: ClassVar[str] = "rotation"
    unties_embeddings = True

    def __init__(self, hidden_size: int, matrix: str = "hadamard", seed: int = 0) -> None:
        rotation = ORTHOGONAL_MATRICES[matrix](hidden_size, seed)
        if rotation is None:
            raise UserError(
                f"No Hadamard matrix is known for the hidden size {hidden_size}. Set transform.matrix=orthogonal."
            )
        self.matrix, self.seed = matrix, seed
        self.rotation = rotation  # Q, float32 [hidden_size, hidden_size]

    @torch.no_grad()
    def plan(self, model: BlockModel) -> Mapping[str, TensorFunction]:
        hidden_size = model.model.config.get_text_config().hidden_size
        if hidden_size != len(self.rotation):
            raise UserError(
                f"The rotation is for a hidden size of {len(self.rotation)}, the model has {hidden_size}. Use the model "
                "that the parent was made from."
            )
        stream = trace_residual_stream(model)
        shared = _PerDevice(self.rotation)
        functions: dict[str, TensorFunction] = {f"{stream.embedding}.weight": _RotateInputs(shared)}
        for norm in stream.norms:
            gain = model.read_tensor(f"{norm.norm}.weight").float() + (1 - norm.unit)
            functions[f"{norm.norm}.weight"] = _Constant(norm.unit)
            functions |= {f"{reader}.weight": _RotateInputs(shared, _PerDevice(gain)) for reader in norm.readers}
        for writer in stream.writers:
            functions |= {f"{writer}.{tensor}": _RotateOutputs(shared) for tensor in ("weight", "bias")}
        existing = {name for name, _ in named_tensors(model.model)}
        functions = {name: function for name, function in functions.items() if name in existing}
        self._check(model, stream, functions)
        return functions

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "matrix": self.matrix,
            "seed": self.seed,
            "hidden_size": len(self.rotation),
            "sha256": matrix_sha256(self.rotation),
        }

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> "ResidualRotation":
        try:
            matrix = str(description["matrix"])
            size, seed, sha256 = (description[key] for key in ("hidden_size", "seed", "sha256"))
            found = cls(int(size), matrix=matrix, seed=int(seed))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{dict(description)} does not describe a rotation: {error!r}. Quantize again.") from error
        if found.to_json()["sha256"] != sha256:
            raise UserError(
                f"The rotation that this machine computes from matrix={matrix} and seed={seed} differs from the "
                "parent's, since the rounding of a QR decomposition differs between machines. Load a packed folder, or "
                "quantize again with transform.matrix=hadamard, which is equal on every machine."
            )
        return found

    def _check(self, model: BlockModel, stream: ResidualStream, functions: Mapping[str, TensorFunction]) -> None:
        """Check on a few tokens, for one block of each kind, that its output is rotated as its input is."""
        device, dtype = torch.device("cpu"), torch.float32
        hidden, kwargs = model.probe(device, dtype)
        for index in stream.traced_blocks:
            path = model.block_names[index]
            with model.on_device(index, device, dtype):
                expected = model.run_block(index, hidden, kwargs[index])
                rotated = {
                    name: functions[f"{path}.{name}"](tensor)
                    for name, tensor in named_tensors(model.blocks[index])
                    if f"{path}.{name}" in functions
                }
                with swapped_tensors(model.blocks[index], rotated):
                    found = model.run_block(index, hidden @ self.rotation, kwargs[index])
            error = (found - expected @ self.rotation).norm() / (expected - hidden).norm()
            if not error <= _MAX_ERROR:
                raise unsupported(model, f"a rotation of the hidden states changes the output of {path}")


class _PerDevice:
    """Tensor with a copy for each device and dtype that it was used in."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {(tensor.device, tensor.dtype): tensor}
        self._original = tensor

    def like(self, tensor: Tensor) -> Tensor:
        """Copy on the device of another tensor, in its dtype."""
        key = (tensor.device, tensor.dtype)
        if key not in self._copies:
            self._copies[key] = self._original.to(*key)
        return self._copies[key]


@dataclasses.dataclass(frozen=True, slots=True)
class _Constant:
    """Replacement of all values by one constant."""

    value: float

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class _RotateInputs:
    """W diag(gain) Q for W [out_features, in_features]; computed in at least float32."""

    rotation: _PerDevice
    gain: _PerDevice | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        rotated = torch.empty_like(tensor)
        rows = max(1, _ELEMENTS_AT_ONCE // tensor.shape[1])
        for start in range(0, len(tensor), rows):
            part = _widened(tensor[start : start + rows])
            if self.gain is not None:
                part = part * self.gain.like(part)
            rotated[start : start + rows] = part @ self.rotation.like(part)
        return rotated


@dataclasses.dataclass(frozen=True, slots=True)
class _RotateOutputs:
    """Q^T W for W [out_features, in_features] or a bias [out_features]; computed in at least float32."""

    rotation: _PerDevice

    def __call__(self, tensor: Tensor) -> Tensor:
        wide = _widened(tensor)
        return (self.rotation.like(wide).T @ wide).to(tensor.dtype)


def _widened(tensor: Tensor) -> Tensor:
    """Tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
