"""Generated source as text: deterministic, readable, complete, nothing unused, stand-alone."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
from typing import get_args

import pytest
from flasheva_compile.lowering import inspect
from flasheva_compile.lowering.emit.arguments import arguments
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.load import write
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.spec import AnyKind, digest

from tests.kernels import families

SPECS = {**families.specs(), **families.all_specs()}
# What the project's own rules say about text that is not written by hand: no annotations, no
# docstring for every function. Expressions are as long as they need to be.
RULES = "E,F,W,I,B,C4,SIM,PIE,RET,PLR0133,PLR1711"

DIGESTS = """
import hashlib
from tests.kernels.test_source import generated
text = "".join(kernel.source for kernel in generated().values())
print(hashlib.sha256(text.encode()).hexdigest())
"""

STAND_ALONE = """
import importlib.util, pathlib, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flasheva_compile", "tests", "lowering"):
            raise ImportError("generated code may not import " + name)

sys.meta_path.insert(0, Refusing())
for path in pathlib.Path(sys.argv[1]).glob("*.py"):
    spec = importlib.util.spec_from_file_location("generated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.launch), path
"""


def generated():
    return {name: emit(spec, choose(spec)) for name, spec in SPECS.items()}


@pytest.fixture(scope="module", name="kernels")
def _kernels():
    return generated()


def _python(*command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_text_does_not_depend_on_the_process():
    seeds = ("0", "1")
    texts = [_python("-c", DIGESTS, env={**os.environ, "PYTHONHASHSEED": s}) for s in seeds]
    assert texts[0] == texts[1]


def test_names_identify_texts(kernels):
    by_name = {}
    for kernel in kernels.values():
        assert kernel.name.endswith(digest(kernel.source))
        assert by_name.setdefault(kernel.name, kernel.source) == kernel.source
    texts = {kernel.source for kernel in kernels.values()}
    assert len(texts) == len(by_name)


def _kernel_and_launcher(source: str) -> tuple[ast.FunctionDef, ast.FunctionDef]:
    *_, kernel, launcher = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    return kernel, launcher


def test_arguments_are_those_that_the_body_reads(kernels):
    for name, kernel in kernels.items():
        function, launcher = _kernel_and_launcher(kernel.source)
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        listed = [argument.arg for argument in function.args.args]
        assert launcher.name == "launch"
        assert function.name == kernel.spec.kind
        assert listed == list(kernel.arguments)
        assert not set(listed) - read, f"{name} does not read all of its arguments"


def test_every_name_is_defined(kernels):
    """An argument that ``arguments.py`` does not know would be an unknown name on the GPU."""
    for name, kernel in kernels.items():
        tree = ast.parse(kernel.source)
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        bound = {n.id for n in names if isinstance(n.ctx, ast.Store)} | set(dir(builtins))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                bound |= {node.name, *(a.arg for a in node.args.args)}
                bound |= {node.args.vararg.arg} if node.args.vararg else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
        unknown = {n.id for n in names} - bound
        assert not unknown, f"{name} reads {unknown}"


def test_a_switched_off_feature_leaves_no_trace(kernels):
    plain = kernels["causal-bf16-d64-forward"].source
    for word in ("slope", "seed", "dropout", "tanh", "valid", "begin_ptr", "start_ptr"):
        assert word not in plain, word
    for name, there in (("causal", False), ("columns", True)):
        source = kernels[f"{name}-bf16-d64-chunk_tokens"].source
        assert ("bias_columns" in source, "bias_rows(" in source) == (there, there)
    assert "mix(" in kernels["everything-fp16-d64-forward"].source


def test_columns_of_biases_are_a_matter_of_pooling_alone():
    spec = families.base("bf16", 64, bias_columns=True)
    kept = [kind for kind in get_args(AnyKind) if spec.of_kind(kind).bias_columns]
    assert kept == ["chunk_tokens"]


def test_arguments_are_found_by_whole_words():
    assert arguments("q_ptr2 + xq_ptr") == ()
    assert arguments("tl.load(q_ptr) + columns") == ("q_ptr", "columns")


def test_ruff_finds_nothing(kernels, tmp_path):
    pytest.importorskip("ruff", reason="ruff is not installed: pip install .[dev]")
    for kernel in kernels.values():
        write(kernel, tmp_path)
    options = ("--isolated", "--no-cache", "--line-length", "100", "--output-format", "concise")
    command = [sys.executable, "-m", "ruff", "check", *options, "--select", RULES, "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*found[:20], *found[-2:], done.stderr])


def test_files_import_with_nothing_but_triton(kernels, tmp_path):
    for name in families.specs():
        write(kernels[name], tmp_path)
    _python("-I", "-c", STAND_ALONE, str(tmp_path))


def test_writing_repairs_a_damaged_file(kernels, tmp_path):
    kernel = kernels["causal-bf16-d64-forward"]
    path = write(kernel, tmp_path)
    path.write_text("damaged")
    assert write(kernel, tmp_path) == path
    assert path.read_text() == kernel.source
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- python -m flasheva_compile.lowering.inspect --------------------------------------------------


@pytest.fixture(name="_caches")
def _temporary_caches(tmp_path, monkeypatch):
    for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.usefixtures("_caches")
def test_inspect_prints_source_and_resources(capsys, kernels):
    command = "--kind dpool --dtype bf16 --head-dim 64 --chunk-rule mean --target sm_90"
    assert inspect.main(command.split()) == 0
    text = capsys.readouterr().out
    assert "def dpool(" in text
    assert "KernelSpec:\n    kind='dpool', dtype='bf16', head_dim=64" in text
    last = text.splitlines()[-1]
    assert last.startswith("# sm_90: ")
    assert "registers, " in last
    assert "of 232448 bytes of shared memory, no spills, no matrix instruction" in last


@pytest.mark.usefixtures("_caches")
def test_inspect_reads_spec_and_schedule(capsys):
    command = "--head-dim 32 --no-causal --window block --documents padded --block-m 64"
    assert inspect.main([*command.split(), "--block-n", "32", "--num-warps", "4"]) == 0
    text = capsys.readouterr().out
    for part in ("causal=False", "window='block'", "key_mask=True", "block_m=64, block_n=32"):
        assert part in text
    assert "Chunk tokens behind the window" in text
    assert " wgmma" in text.splitlines()[-1]


@pytest.mark.parametrize("command", ["--kind backward", "--target sm_1", "--head-dim many"])
def test_inspect_refuses_what_it_does_not_know(command, capsys):
    with pytest.raises(SystemExit):
        inspect.main(command.split())
    assert command.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dchunk", "dsink"])
def test_parts_of_sums_are_found_in_64_bits(kernels, kind):
    sources = [k.source for k in kernels.values() if k.spec.kind == kind]
    assert sources
    assert all("part = tl.cast(split, tl.int64) * " in source for source in sources)
