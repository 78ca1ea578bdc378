"""FlashEVA for any PyTorch model: ``torch.compile(model, backend="flasheva")``."""

from importlib import import_module as _import_module
from importlib.metadata import entry_points as _entry_points
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

_HERE = _Path(__file__).parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "pyproject.toml").is_file():
    # An uninstalled checkout keeps `kernels/` and `lowering/` beside this package.
    __path__.append(str(_HERE.parent))

from flasheva_compile.config import EvaConfig, FullConfig, HybridConfig  # noqa: E402
from flasheva_compile.errors import (  # noqa: E402
    CaptureError,
    ConfigError,
    FlashEvaError,
    LoweringError,
    PlanError,
    RewriteError,
)
from flasheva_compile.report import CompileReport  # noqa: E402

if _TYPE_CHECKING:
    from flasheva_compile.adaptation.calibrate import calibrate
    from flasheva_compile.adaptation.calibrate_kv import calibrate_kv
    from flasheva_compile.adaptation.select_kv_formats import select_kv_formats
    from flasheva_compile.adaptation.select_layers import select_full_layers
    from flasheva_compile.adaptation.train import adapt
    from flasheva_compile.api import explain
    from flasheva_compile.generation.cache import FlashEvaCache
    from flasheva_compile.generation.checkpoint import from_pretrained
    from flasheva_compile.generation.prepare import prepare, revert
    from flasheva_compile.integrations.accelerate_backend import (
        register_with_accelerate,
        unregister_from_accelerate,
    )
    from flasheva_compile.integrations.trainer import (
        AdaptingTrainer,
        PhaseCallback,
        PhaseMixin,
        phase_arguments,
    )
    from flasheva_compile.integrations.transformers_loading import (
        register_with_transformers,
        unregister_from_transformers,
    )
    from flasheva_compile.ops import flasheva_attention
    from flasheva_compile.quantization.codebooks import KvCodebooks
    from flasheva_compile.quantization.formats import KvStorage

# Loading the compiler loads torch.compile's own machinery, and generation transformers: only when
# they are used.
_WHERE = {
    "AdaptingTrainer": "flasheva_compile.integrations.trainer",
    "FlashEvaCache": "flasheva_compile.generation.cache",
    "KvCodebooks": "flasheva_compile.quantization.codebooks",
    "KvStorage": "flasheva_compile.quantization.formats",
    "PhaseCallback": "flasheva_compile.integrations.trainer",
    "PhaseMixin": "flasheva_compile.integrations.trainer",
    "adapt": "flasheva_compile.adaptation.train",
    "calibrate": "flasheva_compile.adaptation.calibrate",
    "calibrate_kv": "flasheva_compile.adaptation.calibrate_kv",
    "explain": "flasheva_compile.api",
    "flasheva_attention": "flasheva_compile.ops",
    "from_pretrained": "flasheva_compile.generation.checkpoint",
    "phase_arguments": "flasheva_compile.integrations.trainer",
    "prepare": "flasheva_compile.generation.prepare",
    "register_with_accelerate": "flasheva_compile.integrations.accelerate_backend",
    "register_with_transformers": "flasheva_compile.integrations.transformers_loading",
    "revert": "flasheva_compile.generation.prepare",
    "select_kv_formats": "flasheva_compile.adaptation.select_kv_formats",
    "select_full_layers": "flasheva_compile.adaptation.select_layers",
    "unregister_from_accelerate": "flasheva_compile.integrations.accelerate_backend",
    "unregister_from_transformers": "flasheva_compile.integrations.transformers_loading",
}

__all__ = [
    "AdaptingTrainer",
    "CaptureError",
    "CompileReport",
    "ConfigError",
    "EvaConfig",
    "FlashEvaCache",
    "FlashEvaError",
    "FullConfig",
    "HybridConfig",
    "KvCodebooks",
    "KvStorage",
    "LoweringError",
    "PhaseCallback",
    "PhaseMixin",
    "PlanError",
    "RewriteError",
    "adapt",
    "calibrate",
    "calibrate_kv",
    "explain",
    "flasheva_attention",
    "from_pretrained",
    "phase_arguments",
    "prepare",
    "register_with_accelerate",
    "register_with_transformers",
    "revert",
    "select_full_layers",
    "select_kv_formats",
    "unregister_from_accelerate",
    "unregister_from_transformers",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(_import_module(_WHERE[name]), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def _register_unless_installed() -> None:
    """Make the backend known by name in a checkout that is not installed.

    An installation has an entry point, which torch finds without this import.
    """
    if _entry_points(group="torch_dynamo_backends", name="flasheva"):
        return
    from flasheva_compile._torch_compat import register_backend
    from flasheva_compile.backend import flasheva_backend

    register_backend("flasheva", flasheva_backend)


_register_unless_installed()
