"""Let accelerate, and with it transformers' Trainer, accept the backend's name."""

from __future__ import annotations

from typing import Any

_NAME = "FLASHEVA"


def register_with_accelerate() -> None:
    """Make ``"flasheva"`` a Dynamo backend of accelerate.

    Afterwards ``TorchDynamoPlugin(backend="flasheva", options={...})``,
    ``Accelerator(dynamo_backend="flasheva")`` and ``TrainingArguments(
    torch_compile_backend="flasheva")`` compile with it. accelerate keeps the names in an enum,
    which cannot be extended by public means: this adds a member to it. Calling it again changes
    nothing, and :func:`unregister_from_accelerate` undoes it. ``model.compile(backend="flasheva")``
    before training needs none of this.

    Example:
        >>> fe.register_with_accelerate()
        >>> Trainer(model, TrainingArguments(folder, torch_compile_backend="flasheva"), ...)
    """
    backends = _backends()
    if _NAME in backends.__members__:
        return
    member = str.__new__(backends, _NAME)
    member._name_ = member._value_ = _NAME
    member._sort_order_ = len(backends._member_names_)
    type.__setattr__(backends, _NAME, member)
    backends._member_map_[_NAME] = member
    backends._value2member_map_[_NAME] = member
    backends._member_names_.append(_NAME)


def unregister_from_accelerate() -> None:
    """Undo :func:`register_with_accelerate`, if it was called."""
    backends = _backends()
    if _NAME not in backends.__members__:
        return
    backends._member_names_.remove(_NAME)
    del backends._value2member_map_[_NAME], backends._member_map_[_NAME]
    type.__delattr__(backends, _NAME)


def _backends() -> Any:  # noqa: ANN401 - an enum whose members pyright takes for all there are
    from accelerate.utils import DynamoBackend

    return DynamoBackend
