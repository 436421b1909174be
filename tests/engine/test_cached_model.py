"""What the cached forward pass computes in its own way, against upstream's functions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("nemo", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")


@pytest.mark.parametrize("rotary_dim", [16, 8], ids=["whole heads", "half of a head"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_upstreams_bit_by_bit(interleaved: bool, rotary_dim: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from steerlm_nemo.compat.inference import rotate, rotation

    chance = torch.Generator().manual_seed(0)
    heads = torch.randn(9, 1, 4, 16, generator=chance)
    angles = torch.rand(9, 1, 1, rotary_dim // 2, generator=chance) * 100
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    expected = _apply_rotary_pos_emb_bshd(heads, angles, rotary_interleaved=interleaved)
    assert torch.equal(rotate(heads, *rotation(angles, interleaved, torch.float32), interleaved), expected)
    other = rotate(heads, *rotation(angles, not interleaved, torch.float32), not interleaved)
    assert not torch.allclose(other, expected)
