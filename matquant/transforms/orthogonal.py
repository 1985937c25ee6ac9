"""Orthogonal matrices: randomized Hadamard, and uniformly distributed.

Entries of a randomized Hadamard matrix are +-1/sqrt(size), so every machine computes the same one. Those of a uniformly
distributed matrix come from a QR decomposition, whose rounding differs between machines.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def randomized_hadamard(size: int, seed: int) -> Tensor | None:
    """Hadamard matrix with random signs of its rows, divided by sqrt(size): float32 [size, size], orthogonal.

    Multiplication by it is a randomized Hadamard transform (QuIP#, arXiv 2402.04396).

    Returns:
        None if ``hadamard`` has no matrix of this size.
    """
    matrix = hadamard(size)
    if matrix is None:
        return None
    generator = random.Random(seed)  # its sequence is the same on all platforms
    signs = torch.tensor([1.0 - 2.0 * generator.getrandbits(1) for _ in range(size)], dtype=torch.float64)
    rotation: Tensor = signs[:, None] * matrix / size**0.5
    return rotation.float()


def random_orthogonal(size: int, seed: int) -> Tensor:
    """Orthogonal matrix from the uniform (Haar) distribution: float32 [size, size].

    Q of the QR decomposition of a Gaussian matrix, with the signs of R's diagonal (Mezzadri, arXiv math-ph/0609050).
    """
    with _one_thread():  # the rounding of a decomposition depends on the number of threads
        gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        q, r = torch.linalg.qr(gaussian)
        uniform: Tensor = q * r.diagonal().sign()
        return uniform.float()


ORTHOGONAL_MATRICES: dict[str, Callable[[int, int], Tensor | None]] = {
    "hadamard": randomized_hadamard,
    "orthogonal": random_orthogonal,
}


def hadamard(size: int) -> Tensor | None:
    """Hadamard matrix, float64 [size, size] with entries +-1 and orthogonal rows.

    Kronecker product of Sylvester's matrix (powers of two) and one of Paley's (prime p: order p + 1 if p = 3 mod 4,
    order 2 (p + 1) if p = 1 mod 4).

    Returns:
        None if the size has no such factors; multiples of 64 below 2752 all have them.
    """
    power = size & -size  # largest power of two that divides the size
    while power:
        small = _paley(size // power)
        if small is not None:
            return torch.kron(_sylvester(power), small)
        power //= 2
    return None


def matrix_sha256(matrix: Tensor) -> str:
    """SHA-256 of the float32 bytes of a matrix."""
    return hashlib.sha256(matrix.float().contiguous().numpy().tobytes()).hexdigest()


def _sylvester(size: int) -> Tensor:
    """Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(order: int) -> Tensor | None:
    """Hadamard matrix of order 1 or of Paley's first or second construction; None if there is none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _conference(order - 1)
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        symmetric, identity = _conference(order // 2 - 1), torch.eye(order // 2, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(identity, minus)
    return None


def _conference(prime: int) -> Tensor:
    """Conference matrix of order prime + 1 from quadratic residues: skew for a prime of 3 mod 4, else symmetric."""
    residues = {i * i % prime for i in range(1, prime)}
    signs = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if prime % 4 == 3 else 1
    matrix[1:, 1:] = signs[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
