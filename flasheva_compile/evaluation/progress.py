"""Progress bars of evaluations; tqdm is needed only where one is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

Item = TypeVar("Item")


def counted(items: Iterable[Item], what: str, *, total: int, shown: bool) -> Any:  # noqa: ANN401
    """Iterate over items, with a bar if it is to be shown."""
    if not shown:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, leave=False)
