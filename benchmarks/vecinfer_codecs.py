"""Codecs of random codewords or transforms: speed does not depend on what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.lowering.vecinfer_books import (
    KernelCodebooks,
    KernelTransforms,
    kernel_codebooks,
    kernel_transforms,
)

from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import KvFormat
from flasheva_compile.quantization.transform_coding import LayerTransforms, TransformCodec
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import WordKvFormat
    from flasheva_compile.quantization.fp8 import Fp8Codec

_WIDTHS = {4: (5, 4, 4, 3), 8: (5, 3, 2, 2, 2, 1, 1, 0), 16: (3, 2, 2, *(1,) * 9, *(0,) * 4)}


def random_codec(
    form: KvFormat | WordKvFormat, kv_heads: int, size: int
) -> VqCodec | TransformCodec:
    """Return a codec of heads of ``size`` channels, on the GPU."""
    scale = torch.rand(kv_heads, size, device="cuda") + 0.5
    if isinstance(form, KvFormat):
        words = [torch.randn(1, x.entries, x.vector, device="cuda") for x in (form.key, form.value)]
        return VqCodec(
            LayerCodebooks(scale=scale, keys=words[0], values=words[1]), form, size, size
        )
    widths = [
        torch.tensor(_WIDTHS[x.vector], device="cuda").expand(kv_heads, -1)
        for x in (form.key, form.value)
    ]
    levels = [(1 << w).repeat_interleave(size // w.shape[1], 1).float() for w in widths]
    learned = LayerTransforms(
        key_scale=scale,
        key_rotation=torch.linalg.qr(torch.randn(kv_heads, size, size, device="cuda")).Q,
        key_offset=-2 + 2 / levels[0],
        key_step=4 / levels[0],
        key_widths=widths[0],
        value_order=torch.rand(kv_heads, size, device="cuda").argsort(),
        value_offset=-2 + 2 / levels[1],
        value_step=4 / levels[1],
        value_widths=widths[1],
    )
    codec = codec_of(learned, form, (size, size))
    assert isinstance(codec, TransformCodec)
    return codec


def prepared(
    codec: VqCodec | TransformCodec | Fp8Codec,
) -> KernelCodebooks | KernelTransforms | None:
    """Return what kernels over a bf16 model's cache read; fp8 has none."""
    if isinstance(codec, VqCodec):
        sizes = (codec.head_dim, codec.value_dim)
        return kernel_codebooks(codec.codebooks, sizes, torch.bfloat16)
    if isinstance(codec, TransformCodec):
        return kernel_transforms(codec.transforms, torch.bfloat16)
    return None
