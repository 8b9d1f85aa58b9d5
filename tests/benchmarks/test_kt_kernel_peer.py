"""The peer's weight formats, as its kernels read them: decoded again, within half a step."""

import torch

from benchmarks.kt_kernel_peer import fp8_blocks, int4_groups, mxfp4_groups

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
W = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()


def nibbles(packed):
    return torch.stack((packed & 15, packed >> 4), -1).view(len(packed), -1).long()


def relative(got):
    return ((got - W.float()).norm() / W.float().norm()).item()


def test_fp8_blocks():
    codes, scale = fp8_blocks(W)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (2, 3)
    decoded = codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert relative(decoded) < 0.03


def test_int4_groups():
    codes, scale = int4_groups(W)
    assert codes.shape == (256, 192) and scale.shape == (256, 12) and scale.dtype == torch.bfloat16
    decoded = (nibbles(codes) - 8) * scale.float().repeat_interleave(32, 1)
    assert relative(decoded) < 0.12


def test_mxfp4_groups():
    codes, scale = mxfp4_groups(W)
    code = nibbles(codes)
    decoded = E2M1[code & 7] * (1 - 2.0 * (code >> 3)) * scale.float().repeat_interleave(32, 1)
    assert relative(decoded) < 0.14
    assert torch.equal(scale.float().log2(), scale.float().log2().round())
