"""Hadamard matrices and random orthogonal matrices."""

import pytest
import torch

from matquant.transforms.orthogonal import hadamard, matrix_sha256, random_orthogonal, randomized_hadamard

# 12: Paley's first construction, 28: his second, 20 and 36 times powers of two: factors of common hidden sizes.
SIZES = [1, 2, 8, 12, 28, 64, 36 * 16, 20 * 32, 28 * 32, 60 * 16, 180 * 16, 1024]


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices_have_orthogonal_rows_of_signs(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92, 2752])
def test_sizes_without_a_known_hadamard_matrix(size: int) -> None:
    assert hadamard(size) is None
    assert randomized_hadamard(size, 0) is None


def test_common_hidden_sizes_have_a_hadamard_matrix() -> None:
    for size in (576, 896, 960, 1152, 1536, 2048, 2304, 2560, 2880, 3072):
        assert hadamard(size) is not None, size


def test_a_randomized_hadamard_matrix_depends_on_its_seed_only() -> None:
    one, other = randomized_hadamard(64, 1), randomized_hadamard(64, 2)
    assert one is not None
    assert other is not None
    assert torch.allclose(one @ one.T, torch.eye(64), atol=1e-6)
    assert (one.abs() == 0.125).all()
    assert torch.equal(one, randomized_hadamard(64, 1))
    assert not torch.equal(one, other)
    # Parents record this hash: the matrix of a seed must never change.
    assert matrix_sha256(one) == "14a9e023ec6acb36d487a5035750719922de9c98297b18b68121bc3f977fe2f1"


def test_a_random_orthogonal_matrix_does_not_depend_on_the_number_of_threads() -> None:
    one = random_orthogonal(96, 1)
    torch.set_num_threads(2)
    assert torch.equal(one, random_orthogonal(96, 1))
    assert torch.get_num_threads() == 2
    assert torch.allclose(one @ one.T, torch.eye(96), atol=1e-6)
    assert not torch.allclose(one, random_orthogonal(96, 2), atol=0.1)
