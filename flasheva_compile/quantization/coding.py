"""The codec of what was learned of a layer: of codebooks, or of transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.quantization.formats import KvFormat
from flasheva_compile.quantization.transform_coding import LayerTransforms, TransformCodec
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import WordKvFormat


def codec_of(
    learned: LayerCodebooks | LayerTransforms,
    form: KvFormat | WordKvFormat,
    sizes: tuple[int, int],
    *,
    lookup: bool = False,
) -> VqCodec | TransformCodec:
    """Return what turns keys and values of ``D`` and ``Dv`` channels into codes."""
    if isinstance(form, KvFormat):
        assert isinstance(learned, LayerCodebooks)
        return VqCodec(learned, form, *sizes, lookup=lookup)
    assert isinstance(learned, LayerTransforms)
    return TransformCodec(learned, form, *sizes)
