"""Which model is being compiled: names for its attentions, and guards for rules about layers.

Dynamo hands a backend one graph and no model. A graph may be a whole model, one decoder layer that
was compiled by itself, or what a graph break left of either. Names and indices must be those of
the model that the user sees, so the modules around the graph are looked up on the call stack.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_names import name_layers
from flasheva_compile.site import AttentionSite, MissedSite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from flasheva_compile.config import HybridConfig, LayerName
    from flasheva_compile.site import Place


KEPT = "_flasheva_kept"
"""Attribute of the modules of a prepared model that were not converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """A module that contains the graph, and the graph's own module.

    Attributes:
        model: What names are relative to; None for a plain function.
        frame: Module whose ``forward`` is compiled, if one is.
        local: The frame's variable that holds it.
    """

    model: nn.Module | None
    frame: nn.Module | None
    local: str


def enclosing_scopes() -> tuple[Scope, ...]:
    """Return the scopes that names may be relative to, the outermost first."""
    found = compat.compiled_frame_module()
    if found is None:
        return (Scope(model=None, frame=None, local=""),)
    local, frame = found
    around = [m for m in reversed(compat.modules_on_stack()) if _contains(m, frame)]
    # DataParallel and OptimizedModule put a prefix before names that nobody wrote.
    around = [m for m in around if not type(m).__module__.startswith("torch.")]
    if not any(m is frame for m in around):
        around.append(frame)
    return tuple(Scope(model=m, frame=frame, local=local) for m in around)


def is_prepared(scope: Scope) -> bool:
    """Tell whether the graph belongs to a model that ``prepare`` converted."""
    return scope.frame is not None and any(KEPT in vars(m) for m in scope.frame.modules())


def name_places(places: Sequence[Place], scope: Scope) -> tuple[LayerName, ...]:
    """Name attentions as ``scope.model.named_modules()`` does."""
    if scope.model is None:
        paths, modules = [place.local_path for place in places], []
    else:
        by_id = {id(module): name for name, module in scope.model.named_modules()}
        own = id(scope.frame)  # attention in the compiled frame itself: Dynamo names no module
        paths = [by_id.get(place.module_id or own, place.local_path) for place in places]
        modules = list(by_id.values())
    named = {name.path: name for name in name_layers(paths, modules)}
    return tuple(named[path] for path in paths)


def refuse_shared_bodies(
    sites: Sequence[AttentionSite | MissedSite],
) -> tuple[AttentionSite | MissedSite, ...]:
    """Refuse attentions of a nested_compile_region that several layers share, where rules differ.

    Dynamo traces the region once: all of them carry the names of the first layer.
    """
    outputs = Counter(site.output for site in sites if isinstance(site, AttentionSite))
    reason = "layers share one nested_compile_region: rules cannot tell them apart"
    return tuple(
        MissedSite(place=site.place, reason=reason)
        if isinstance(site, AttentionSite) and outputs[site.output] > 1
        else site
        for site in sites
    )


def choose_scope(places: Sequence[Place], hybrid: HybridConfig) -> Scope:
    """Return the outermost scope in which every rule names something.

    Raises:
        ConfigError: There is none; the error of the outermost is raised.
    """
    scopes, failure = enclosing_scopes(), None
    for scope in scopes:
        modules = [] if scope.model is None else [n for n, _ in scope.model.named_modules()]
        try:
            hybrid.check(name_places(places, scope), modules)
        except ConfigError as error:
            failure = failure or error
        else:
            return scope
    raise failure or AssertionError("no scope")


def guard_rules(scope: Scope, places: Sequence[Place], hybrid: HybridConfig) -> None:
    """Keep a graph that was compiled for one layer from serving layers with other rules.

    All layers of a kind share their code, hence, without a guard, their compiled graph. Each gets
    an attribute that spells the rules in force for its attentions, and the graph is guarded on it.

    Raises:
        ConfigError: There are more different rules than graphs that Dynamo keeps of one function:
            the other layers would run uncompiled, with full attention.
    """
    if scope.frame is None or scope.model is None or scope.frame is scope.model:
        return
    if not hybrid.rules:
        return
    tag = hashlib.sha256(hybrid.to_json().encode()).hexdigest()[:12]
    attribute = f"_flasheva_rules_{tag}"
    modules = [name for name, _ in scope.model.named_modules()]
    inner = [_relative(place, scope.frame) for place in places]
    spelled: dict[nn.Module, str] = {}
    for name, module in scope.model.named_modules():
        if type(module) is type(scope.frame):
            paths = [".".join(filter(None, (name, path))) for path in inner]
            spelled[module] = repr([hybrid.resolve(x) for x in name_layers(paths, modules)])
    different, limit = len(set(spelled.values())), compat.recompile_limit()
    if different > limit:
        raise ConfigError(
            f"{different} different rules for layers that are compiled one by one; Dynamo keeps "
            f"{limit} graphs of one function",
            subject="layers",
            hint="compile the whole model, or raise torch._dynamo.config.recompile_limit",
        )
    for module, rules in spelled.items():
        # Not a parameter or buffer: past nn.Module's bookkeeping, so state_dict is unchanged.
        module.__dict__[attribute] = rules
    compat.guard_on_attribute(scope.local, attribute)


def _relative(place: Place, frame: nn.Module) -> str:
    by_id = {id(module): name for name, module in frame.named_modules()}
    return by_id.get(place.module_id or 0, place.local_path)


def _contains(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())
