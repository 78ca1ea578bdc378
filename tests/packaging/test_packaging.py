"""The package imports, registers its backend and runs its tests however it is installed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "flasheva_compile",
    "lowering",
    "kernels",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# One program that uses every part of an installation. It must not matter whether transformers is
# imported from a folder that has a kernels/ of its own.
PROGRAM = """
import torch
assert "flasheva" in torch._dynamo.list_backends(exclude_tags=()), "no entry point"
import sys
theirs = set(sys.modules)  # torch._dynamo may import triton
import flasheva_compile
assert not {"transformers", "triton"} & (set(sys.modules) - theirs)
from flasheva_compile.config import EvaConfig
from flasheva_compile.lowering import cost
from flasheva_compile.kernels.reference import attention
from transformers import LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
assert callable(torch._dynamo.lookup_backend("flasheva"))
print(is_kernels_available(), flasheva_compile.__path__[0], attention.__file__)
"""

# What the Hugging Face package `kernels` is to transformers: a distribution with a version, and a
# module from which it takes many names.
HF_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): ...
    def __call__(self, decorated=None, *args, **kwargs):
        return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {})
"""


def run(*command, cwd, env=None):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_environment(folder):
    """A fresh virtual environment that sees the packages of this one, but not its .pth files."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd="/")
    (site,) = folder.glob("lib/python*/site-packages")
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("\n".join(outer) + "\n")
    return site


def install(python, *what):
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what, cwd="/")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind in the real ones."""
    target = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", target, checkout, cwd="/")
    shutil.rmtree(checkout / "build", ignore_errors=True)
    (path,) = target.glob("flasheva_compile-*.whl")
    return path


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installation(request, checkout, tmp_path_factory):
    """A virtual environment that has the package, and its site-packages."""
    folder = tmp_path_factory.mktemp(request.param)
    site = make_environment(folder)
    python = folder / "bin" / "python"
    if request.param == "editable":
        install(python, "-e", checkout)
    else:
        install(python, request.getfixturevalue("wheel"))
    return python, site


@pytest.fixture
def hf_kernels(installation):
    """The Hugging Face package `kernels`, as far as transformers looks at it."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    _, site = installation
    package, info = site / "kernels", site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    (package / "layer").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(HF_KERNELS)
    (package / "layer" / "__init__.py").write_text("")
    (package / "layer" / "mode.py").write_text("class Mode: ...\n")
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    yield
    shutil.rmtree(package)
    shutil.rmtree(info)


def folders_with_code():
    """Every folder of the package, as its import name and its place in the checkout."""
    for top, name in (
        ("flasheva_compile", "flasheva_compile"),
        ("lowering", "flasheva_compile.lowering"),
        ("kernels", "flasheva_compile.kernels"),
    ):
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            if path.is_dir() and path.name != "__pycache__":
                below = path.relative_to(ROOT / top).parts
                yield ".".join((name, *below)), path.relative_to(ROOT).as_posix()


def test_pyproject_lists_every_folder():
    folders = dict(folders_with_code())
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    for package, folder in folders.items():
        place = SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        assert place == folder


@pytest.mark.parametrize("folder", ["kernels", "lowering"])
def test_no_init_file_shadows_the_hugging_face_package(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.slow
def test_wheel_holds_everything_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"flasheva_compile/py.typed", "flasheva_compile/lowering/schedules.json"}
    for package, folder in folders_with_code():
        files = (ROOT / folder).glob("*.py")
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in files}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_installed(installation, checkout, tmp_path, place):
    python, _ = installation
    available, *_ = run(
        python, "-c", PROGRAM, cwd=checkout if place == "root" else tmp_path
    ).split()
    assert available == "False"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_installed_beside_the_hugging_face_package(
    installation, hf_kernels, checkout, tmp_path, place
):
    python, _ = installation
    available, *_ = run(
        python, "-c", PROGRAM, cwd=checkout if place == "root" else tmp_path
    ).split()
    assert available == "True"


@pytest.mark.slow
def test_the_wheel_brings_its_own_kernels(installation, tmp_path):
    python, site = installation
    _, package, reference = run(python, "-c", PROGRAM, cwd=tmp_path).split()
    if (site / "flasheva_compile").is_dir():
        assert package == str(site / "flasheva_compile")
        assert reference.startswith(package)


@pytest.mark.slow
def test_checkout_without_installation(checkout, tmp_path):
    site = make_environment(tmp_path)
    program = PROGRAM.replace('assert "flasheva" in', 'assert "inductor" in').replace(
        'assert callable(torch._dynamo.lookup_backend("flasheva"))', ""
    )
    python = tmp_path / "bin" / "python"
    run(python, "-c", program, cwd=checkout)
    run(python, "-c", program, cwd=site, env={"PYTHONPATH": str(checkout)})


@pytest.mark.slow
@pytest.mark.parametrize("command", ["python -m pytest", "pytest"])
def test_pytest_from_the_root(installation, checkout, command):
    python, _ = installation
    tests = ("-q", "-p", "no:cacheprovider", "tests/unit/test_config.py")
    if command == "pytest":  # the script: the root is not put on sys.path
        script = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main())"
        out = run(python, "-c", script, *tests, cwd=checkout)
    else:
        out = run(python, "-m", "pytest", *tests, cwd=checkout)
    assert " passed" in out
