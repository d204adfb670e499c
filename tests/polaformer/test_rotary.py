"""Rotary embedding: which pairs rotate by what, exact angles, inversion."""

import torch

from polaformer.rotary import apply_rotary, rotary_embedding


def test_first_half_rotates_by_row_second_by_column():
    x = torch.ones(6, 8)  # 2 rows × 3 columns, 8 features
    rotated = apply_rotary(x, rotary_embedding(2, 3, 8, x))
    first, second = rotated.chunk(2, dim=-1)
    torch.testing.assert_close(first[0], first[2])  # tokens 0 and 2 share a row
    torch.testing.assert_close(second[1], second[4])  # tokens 1 and 4 share a column
    assert not torch.allclose(first[0], first[3])
    assert not torch.allclose(second[0], second[1])


def test_rotation_matrix():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(6, 1)
    rotated = apply_rotary(x, rotary_embedding(2, 3, 4, x))  # one pair per half, both frequencies 1
    row, column = torch.tensor(1.0), torch.tensor(2.0)  # of the last token
    expected = torch.stack((row.cos(), row.sin(), -column.sin(), column.cos()))
    torch.testing.assert_close(rotated[-1], expected)


def test_rotation_preserves_norm_and_inverts():
    x = torch.randn(2, 3, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = rotary_embedding(4, 5, 32, x)
    rotated = apply_rotary(x, rotary)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(apply_rotary(rotated, rotary.conj_physical()), x)
