"""The only file that touches private torch modules: one function for what torch may change."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.traceback as fx_traceback
from torch import nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.backends import registry
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_optimize_ddp_mode
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

log = logging.getLogger(__name__)

__all__ = [
    "autocast_switch",
    "below_autograd",
    "blocks_of_mask",
    "compile_aot_eager",
    "compile_inductor",
    "compiled_frame_module",
    "compiled_variants",
    "graph_break",
    "guard_on_attribute",
    "has_cpp_compiler",
    "in_forward_differentiation",
    "inductor_option_names",
    "is_flex_call",
    "is_higher_order",
    "is_higher_order_call",
    "is_module_state",
    "is_real_tensor",
    "modules_on_stack",
    "node_of_stack",
    "plain_execution",
    "real_attribute",
    "recompile_limit",
    "register_backend",
    "splits_for_ddp",
    "symbol_hints",
    "through_dynamo",
    "trace_pre_dispatch",
    "traced_node",
]


def trace_pre_dispatch(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace ``function`` to pre-dispatch ATen under the fake mode of the running compilation.

    Inputs that are real tensors are replaced by the fakes that Dynamo already made for them, so
    symbolic sizes stay the ones that the rest of the compilation reasons about. Fakes are traced
    under the mode that made them: Dynamo's own values are older than the backend's mode.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), mode)
    if mode is None:
        message = "no running compilation: call this from a torch.compile backend"
        raise RuntimeError(message)
    fakes = [mode.from_tensor(x) if is_real_tensor(x) else x for x in inputs]
    with _restored_global_state(), mode, fx_traceback.preserve_node_meta():
        return make_fx(
            function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
        )(*fakes)


@contextmanager
def _restored_global_state() -> Iterator[None]:
    """Leave grad mode, autocast and functorch's levels as they were, also after a failed trace."""
    depth = _functorch.get_dynamic_layer_stack_depth()
    grad = torch.is_grad_enabled()
    devices = ("cpu", "cuda")
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    try:
        yield
    finally:
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        torch._C._set_grad_enabled(grad)
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def traced_node(value: torch.Tensor) -> torch.fx.Node | None:
    """Return the node that stands for a tensor in the trace that is running."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    found = get_proxy_slot(value, mode.tracer, None)
    return None if found is None else found.proxy.node


def blocks_of_mask(
    visible: torch.Tensor, block_sizes: tuple[int, int], *, full: bool
) -> list[torch.Tensor]:
    """Return the lists of blocks that flex_attention's ``create_block_mask`` makes of a mask.

    Args:
        visible: ``[B, H, Q, K]`` of bool.
        block_sizes: Queries and keys of a block.
        full: Blocks that are visible as a whole are listed apart.
    """
    from torch.nn.attention import flex_attention

    make, order = flex_attention._convert_mask_to_block_mask, flex_attention._dense_to_ordered
    lists = make(visible, *block_sizes, separate_full_blocks=full)
    return [x for blocks in lists if blocks is not None for x in order(blocks)]


def autocast_switch(target: object) -> str:
    """Return "enter" or "exit" for the calls by which Dynamo's graphs spell autocast regions."""
    name = getattr(target, "__name__", "")
    return {"_enter_autocast": "enter", "_exit_autocast": "exit"}.get(name, "")


def is_real_tensor(value: object) -> bool:
    """Return whether ``value`` is a tensor with data (not a fake)."""
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def real_attribute(node: torch.fx.Node) -> torch.Tensor | None:
    """Return the tensor with data that a ``get_attr`` node holds, if it has data."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value.detach() if is_real_tensor(value) else None


def symbol_hints(size: torch.SymInt) -> dict[Any, int]:
    """Return the value that each symbol of a symbolic size had when it was traced."""
    environment = size.node.shape_env
    # The first name is that of newer versions.
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return {s: int(known[s]) for s in size.node.expr.free_symbols if s in known}


@contextmanager
def plain_execution() -> Iterator[None]:
    """Run ops on real tensors as an ordinary program would, whatever compilation is going on."""
    with (
        unset_fake_temporarily(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        _disable_current_modes(),
    ):
        yield


def is_module_state(placeholder: torch.fx.Node) -> bool:
    """Return whether an input of Dynamo's graph is a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def is_higher_order_call(node: torch.fx.Node) -> bool:
    """Return whether the node calls a higher-order op, whose bodies are graphs of their own."""
    return is_higher_order(node.target)


def is_higher_order(target: object) -> bool:
    """Return whether ``target`` is a higher-order op."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def body_and_operands(target: object, args: Sequence[Any]) -> tuple[Any, Sequence[Any]] | None:
    """Split what a call is given that only runs a body: a checkpoint, a nested_compile_region."""
    match getattr(target, "__name__", ""):
        case "tag_activation_checkpoint":
            return args[0], args[1:]
        case "invoke_subgraph":
            return args[0], args[2:]
    return None


def is_flex_call(target: object) -> bool:
    """Return whether ``target`` is the higher-order op of flex_attention."""
    return target is getattr(torch.ops.higher_order, "flex_attention", None)


def node_of_stack(node: torch.fx.Node) -> AbstractContextManager[None]:
    """Give what is traced inside the metadata of a node of Dynamo's graph."""
    return fx_traceback.set_current_meta(node)


def compiled_frame_module() -> tuple[str, nn.Module] | None:
    """Return the local name and module of the frame being compiled, if a module owns the frame."""
    root = InstructionTranslator.current_tx().output.root_tx
    for name, value in (root.f_locals if root is not None else {}).items():
        if isinstance(value, nn.Module):
            return name, value
    return None


def guard_on_attribute(local_name: str, attribute: str) -> None:
    """Make the compiled code valid only while ``<local>.<attribute>`` keeps its value."""
    source = AttrSource(LocalSource(local_name), attribute)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))


def compiled_variants() -> int:
    """Return how many graphs Dynamo keeps of the code that is being compiled, this one counted."""
    root = InstructionTranslator.current_tx().output.root_tx
    return 1 if root is None else 1 + len(_debug_get_cache_entry_list(root.f_code))


def recompile_limit() -> int:
    """Return how many graphs of one function Dynamo keeps; further calls run uncompiled."""
    return torch._dynamo.config.recompile_limit


def modules_on_stack() -> list[nn.Module]:
    """Return the modules whose methods are running, innermost first."""
    found: list[nn.Module] = []
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and all(module is not m for m in found):
            found.append(module)
        frame = frame.f_back
    return found


def splits_for_ddp() -> bool:
    """Return whether Dynamo splits the running graph where DistributedDataParallel has buckets."""
    active = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return active is not None and get_optimize_ddp_mode() == "ddp_optimizer"


def register_backend(name: str, backend: Callable[..., Any]) -> None:
    """Make a backend known to ``torch.compile`` by name, once."""
    if name not in registry._COMPILER_FNS:
        registry.register_backend(backend, name=name)


def through_dynamo(error: Exception) -> Exception:
    """Return an error of the same class that Dynamo hands to the caller unwrapped.

    Dynamo wraps what a backend raises in ``BackendCompilerFailed``, so ``except ConfigError``
    would not work, unless it is a ``ShortenTraceback``.
    """

    class Shortened(type(error), ShortenTraceback):  # type: ignore[misc]
        def __init__(self, original: Exception) -> None:
            self.__dict__.update(original.__dict__)
            Exception.__init__(self, str(original))
            self.args = (str(original),)
            self.first_useful_frame = None

    Shortened.__name__ = type(error).__name__
    Shortened.__qualname__ = type(error).__qualname__
    Shortened.__module__ = type(error).__module__
    return Shortened(error)


def inductor_option_names() -> frozenset[str]:
    """Return the names that Inductor accepts as options, dots as in its documentation."""
    import torch._inductor

    names = torch._inductor.list_options()
    return frozenset(names) | frozenset(name.replace(".", "_") for name in names)


def has_cpp_compiler() -> bool:
    """Return whether Inductor can find a C++ compiler for CPU code."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        log.debug("no C++ compiler for Inductor", exc_info=True)
        return False
    return True


def compile_inductor(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """Compile with Inductor as ``torch.compile(backend="inductor", mode=, options=)`` would."""
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx

    patches = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    patches.update({name.replace("-", "_"): value for name, value in options.items()})
    compiled: Any = compile_fx(graph, list(inputs), config_patches=patches or None)
    return compiled


def compile_aot_eager(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile with AOTAutograd and run the result eagerly."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(graph, list(inputs))


def graph_break(graph: torch.fx.GraphModule) -> str | None:
    """Say why Dynamo ended a graph before its function ends, and where; None = it did not."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text, *more = (line.strip() for line in reason.reason.splitlines())
    if text.startswith("generic_jump"):
        text = "a branch depends on what a tensor holds"
    explained = next((x for x in more if x.startswith("Explanation:")), "")
    why = " ".join(filter(None, (text, explained.removeprefix("Explanation:").strip())))
    frame = next(reversed(reason.user_stack), None)
    return f"{why} ({Path(frame.filename).name}:{frame.lineno})" if frame else why


def mark_static_addresses(tensors: Iterable[torch.Tensor]) -> None:
    """Tell CUDA graphs that these tensors stay where they are; without effect while tracing."""
    if not torch.compiler.is_compiling():
        for x in tensors:
            torch._dynamo.mark_static_address(x)


def in_forward_differentiation() -> bool:
    """Return whether tensors may carry tangents: a level of forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def below_autograd(
    op: Any,  # noqa: ANN401 - PyTorch has no public types of these
    keyset: Any,  # noqa: ANN401
    args: Sequence[Any],
    options: dict[str, Any],
) -> Any:  # noqa: ANN401
    """Call an operator below autograd, from the code that autograd runs for it.

    Args:
        op: The overload.
        keyset: What the dispatcher handed to that code (``with_keyset=True``).
        args: Positional arguments.
        options: Keyword arguments.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)
