"""The contestants of attention_gpu.py: FlashEVA, SDPA's kernels and FlexAttention.

All take the same tensors. A contestant prepares one set of inputs into a forward function and the
leaves of its gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.kernels.reference.attention import eva_attention_from_chunk_tokens
from flex_eva import JointAxis, block_mask, constant_bias, join, split, tensor_bias
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from flasheva_compile.op_checks import OP_VERSION
from flasheva_compile.ops import flasheva_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.lowering.op import EvaOp
    from roofline import Formulation
    from torch import Tensor

Prepared = tuple["Callable[[], Tensor]", "tuple[Tensor, ...]"]
MAX_REFERENCE_LENGTH = 4096  # the dense fp32 reference takes N x (N + C) scores
MAX_DIFFERENCE = 2e-2  # of the largest entry; bf16 keeps 2^-8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention to measure.

    Attributes:
        op: What FlashEVA computes.
        length: Tokens.
        batch: Rows.
        dtype: Of queries, keys and values.
    """

    op: EvaOp
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of ``flasheva_attention`` that the attention op has too."""
        names = ("window_size", "chunk_size", "window", "causal", "scale")
        return {**{n: getattr(self.op, n) for n in names}, "sink_tokens": self.op.sink_size}

    @property
    def axis(self) -> JointAxis:
        """Return FlexAttention's joint axis."""
        names = ("window_size", "chunk_size", "sink_size", "window", "causal")
        return JointAxis(length=self.length, **{name: getattr(self.op, name) for name in names})

    @property
    def set_bytes(self) -> int:
        """Return the bytes of one set of inputs."""
        heads = 2 * self.op.heads + 2 * self.op.kv_heads
        return self.batch * heads * self.length * self.op.head_dim * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One set of inputs; ``phi`` is the tangent rule's parameter, 0 as in a new model."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi: Tensor
    dout: Tensor


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draw one set of inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    op = case.op

    def normal(heads: int) -> Tensor:
        shape = (case.batch, heads, case.length, op.head_dim)
        return torch.randn(shape, dtype=case.dtype, device=device, generator=generator)

    q, dout = normal(op.heads), normal(op.heads)
    k, v = normal(op.kv_heads), normal(op.kv_heads)
    phi = torch.zeros(op.kv_heads, op.head_dim, dtype=case.dtype, device=device)
    for leaf in (q, k, v, phi):
        leaf.requires_grad_()
    return Inputs(q=q, k=k, v=v, phi=phi, dout=dout)


@dataclass(frozen=True, kw_only=True)
class FlexSettings:
    """How FlexAttention is compiled.

    Attributes:
        mode: ``torch.compile(mode=)``.
        bias: ``"constant"``: the chunk bias is one number, as in a model that was not trained;
            ``"tensor"``: it is read, as the FlashEVA kernels always do.
        kernel_options: ``flex_attention(kernel_options=)``.
        compiled: False for a device that it does not compile for.
    """

    mode: str | None = None
    bias: str = "constant"
    kernel_options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = True


def prepare_flasheva(case: Case, x: Inputs) -> Prepared:
    """Pooling and attention, with gradients for q, k, v and phi."""
    options = {**case.options, "parameters": [x.phi]}
    return lambda: flasheva_attention(x.q, x.k, x.v, **options)[0], (x.q, x.k, x.v, x.phi)


def chunk_tokens(case: Case, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Pool keys and values into chunk tokens that are leaves."""
    op = case.op
    options = {"chunk_size": op.chunk_size, "scale": op.scale, "version": OP_VERSION}
    inputs = (x.k.detach(), x.v.detach(), [x.phi.detach()], None, None)
    tokens = torch.ops.flasheva.chunk_tokens(*inputs, rule=op.chunk_rule, **options)
    rfa_k, rfa_v, rfa_bias = (token.detach().clone().requires_grad_() for token in tokens)
    return rfa_k, rfa_v, rfa_bias


def prepare_flasheva_attention(case: Case, x: Inputs) -> Prepared:
    """Attention alone, with gradients for chunk tokens, their biases, q, k and v."""
    leaves = (x.q, x.k, x.v, *chunk_tokens(case, x))
    options = {**case.options, "q_offset": 0, "softcap": 0.0, "dropout_p": 0.0}
    arguments = (*leaves, None, None, None, None)

    def forward() -> Tensor:
        return torch.ops.flasheva.attention(*arguments, **options, version=OP_VERSION)[0]

    return forward, leaves


def sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Prepared]:
    """Return how one of SDPA's kernels is prepared: full attention."""

    def prepare(case: Case, x: Inputs) -> Prepared:
        options = {"is_causal": case.op.causal, "scale": case.op.scale}
        options["enable_gqa"] = case.op.heads != case.op.kv_heads

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(x.q, x.k, x.v, **options)

        return forward, (x.q, x.k, x.v)

    return prepare


def flex(case: Case, settings: FlexSettings, device: torch.device) -> Callable[..., Prepared]:
    """Compile FlexAttention for one case; all sets of inputs share it."""
    torch.compiler.reset()  # one entry per case would soon reach the limit on recompilations
    if settings.compiled:
        keep_saved_tensors()
        attention = torch.compile(flex_attention, dynamic=False, mode=settings.mode)
    else:
        attention = flex_attention
    axis, op = case.axis, case.op
    options: dict[str, Any] = {"block_mask": block_mask(axis, device), "scale": op.scale}
    options["enable_gqa"] = op.heads != op.kv_heads
    if settings.kernel_options:
        options["kernel_options"] = settings.kernel_options
    if settings.bias == "constant" and case.length % op.chunk_size:
        message = "chunks of several sizes have no constant bias: use the tensor"
        raise ValueError(message)

    def prepare(case: Case, x: Inputs) -> Prepared:
        rfa_k, rfa_v, rfa_bias = chunk_tokens(case, x)
        keys = join(axis, rfa_k.detach(), x.k.detach()).requires_grad_(settings.compiled)
        values = join(axis, rfa_v.detach(), x.v.detach()).requires_grad_(settings.compiled)
        q = x.q if settings.compiled else x.q.detach()  # without compilation: forward only
        if settings.bias == "constant":  # phi = 0: ln(chunk size) for every chunk
            score_mod = constant_bias(axis, math.log(op.chunk_size))
        else:
            score_mod = tensor_bias(axis, rfa_bias.detach(), op.heads // op.kv_heads)
        return lambda: attention(q, keys, values, score_mod, **options), (q, keys, values)

    return prepare


def keep_saved_tensors() -> None:
    """Let a compiled backward run more than once on one forward.

    A compiled backward otherwise takes over the memory of saved intermediates (the log-sum-exp)
    and refuses ``retain_graph=True``, which timing the backward alone needs.
    """
    import torch._functorch.config as functorch  # noqa: TID251 - the switch has no public name

    functorch.donated_buffer = False


FORMULATIONS: dict[str, Formulation] = {
    "flasheva": "flasheva",
    "sdpa_flash": "full",
    "sdpa_cudnn": "full",
    "flasheva_attention": "flasheva_attention",
    "flex": "flasheva_attention",
    "flex_autotuned": "flasheva_attention",
}
"""Contestants and what each computes; the last three get their chunk tokens for free."""


def build(
    name: str, case: Case, settings: FlexSettings, device: torch.device
) -> Callable[[Case, Inputs], Prepared]:
    """Return how a contestant prepares a set of inputs."""
    match name:
        case "flasheva":
            return prepare_flasheva
        case "flasheva_attention":
            return prepare_flasheva_attention
        case "sdpa_flash":
            return sdpa(SDPBackend.FLASH_ATTENTION)
        case "sdpa_cudnn":
            return sdpa(SDPBackend.CUDNN_ATTENTION)
        case "flex" | "flex_autotuned":
            return flex(case, settings, device)
    message = f"no contestant {name!r}: {', '.join(FORMULATIONS)}"
    raise ValueError(message)


def compare_with_flex(
    case: Case, x: Inputs, prepare: Callable[[Case, Inputs], Prepared], *, backward: bool
) -> dict[str, float]:
    """Compare FlexAttention with the attention op, outputs and gradients.

    Returns:
        For each tensor the largest absolute difference, and under ``..._relative`` the same over
        the largest entry.
    """
    ours, leaves = prepare_flasheva_attention(case, x)
    theirs, their_leaves = prepare(case, x)
    with torch.set_grad_enabled(backward):
        out, other = ours(), theirs()
    pairs = {"out": (out, other)}
    if backward:
        dq, dk, dv, drfa_k, drfa_v, _ = torch.autograd.grad(out, leaves, x.dout)
        other_dq, djoint_k, djoint_v = torch.autograd.grad(other, their_leaves, x.dout)
        pairs["dq"] = (dq, other_dq)
        (other_rfa_k, other_k), (other_rfa_v, other_v) = (
            split(case.axis, joint) for joint in (djoint_k, djoint_v)
        )
        pairs |= {"dk": (dk, other_k), "dv": (dv, other_v)}
        pairs |= {"drfa_k": (drfa_k, other_rfa_k), "drfa_v": (drfa_v, other_rfa_v)}
    return _differences(pairs)


def compare_with_reference(case: Case, x: Inputs) -> dict[str, float]:
    """Compare the attention op with the dense fp32 formula, first key head, first row."""
    if case.length > MAX_REFERENCE_LENGTH:
        return {}
    group = case.op.heads // case.op.kv_heads
    with torch.no_grad():
        tokens = chunk_tokens(case, x)
        out = prepare_flasheva_attention(case, x)[0]()[:1, :group]
        exact = eva_attention_from_chunk_tokens(
            x.q[:1, :group].float(),
            *(t[:1, :1].float() for t in (x.k, x.v, *tokens)),
            **case.options,
        )[0]
    return _differences({"out": (out, exact)})


def _differences(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    found = {}
    for name, (a, b) in pairs.items():
        # An empty gradient (no chunk is seen) and NaN both have to come through as they are.
        difference = (a.float() - b.float()).abs().max().item()
        largest = b.float().abs().max().item()
        found[name] = difference
        found[f"{name}_relative"] = difference / largest if largest else difference
    return found


def agrees(differences: dict[str, float]) -> bool:
    """Say whether no relative difference is beyond rounding; NaN is."""
    relative = [d for name, d in differences.items() if name.endswith("_relative")]
    return all(d <= MAX_DIFFERENCE for d in relative)
