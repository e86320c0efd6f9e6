"""Test another pair of PyTorch and Triton in an environment of its own, with this script's Python:

    python .ci/pair.py torch==2.9.1 triton==3.5.1 numpy==2.3.5

The arguments replace pins of constraints.txt. A Linux wheel of PyTorch loads CUDA libraries of some 3 GB, which no test
without a GPU calls. CUDA's runtime and its profiling interface are installed, all others replaced by empty stand-ins.
Beside the tests, the families run on the stand-in for a GPU, and every kernel of the released networks is compiled for
sm_90.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ("cuda-runtime", "cuda-cupti")
"""The CUDA libraries that are installed: importing PyTorch calls them."""
NEEDED = re.compile(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl)[^\]]+)\]")
SYMBOL = re.compile(r" UND ((?:cu|nccl|nv)\w+)")
VERSION = {"libnvshmem_host.so.3": "NVSHMEM"}
"""The version of a library's symbols where it is not the library's name."""
TESTS = """tests/platforms tests/families tests/launch tests/checkpoint tests/nets tests/ops/norm tests/ops/linear
    tests/ops/attention/test_attention.py tests/ops/conv/test_sepconv.py tests/ops/conv/test_sepconv_kernel.py
    tests/runtime/test_compiled.py tests/test_atomic.py tests/test_constructors.py tests/test_errors.py"""


def pins(changed: list[str]) -> list[str]:
    """The lines of constraints.txt without torch and Triton, which are installed first, and with other versions."""
    names = {one.split("==")[0] for one in (*changed, "torch==", "triton==")}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "==" in line and line.split("==")[0] not in names]
    return kept + [one for one in changed if not one.startswith(("torch==", "triton=="))]


def requirements() -> list[str]:
    """The names of what the package, its extras and its tests need besides torch and Triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in ("video", "heif", "gpu", "test") for one in extras[name])]
    names = {re.split(r"[\[<>=; ]", one)[0] for one in wanted}
    return sorted(name for name in names if not name.startswith(("torch", "triton", "tinysr-kernels")))


def runtime_of(torch: Distribution) -> list[str]:
    """The small CUDA libraries, in the versions that this build of torch was made with; none of a CPU build."""
    found = []
    for one in torch.requires or []:
        name, _, rest = one.partition("==")
        version = rest.partition(";")[0].strip()
        if name.startswith("cuda-toolkit"):  # 13.0.2 brings libraries of 13.0
            found += [f"nvidia-{library}=={version.rpartition('.')[0]}.*" for library in SMALL]
        elif name.startswith(tuple(f"nvidia-{library}" for library in SMALL)):
            found.append(f"{name}=={version}")
    return found


def stand_in(site: Path) -> list[str]:
    """Make an empty library for every CUDA library that torch loads and that is not there -> their names."""
    folder = site / "torch" / "lib"
    there = {path.name for path in site.glob("nvidia/*/lib/*.so*")} | {path.name for path in folder.iterdir()}
    needed, symbols = set(), set()
    for path in folder.glob("lib*.so"):
        command = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed |= set(NEEDED.findall(text))
        symbols |= set(SYMBOL.findall(text))
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(symbols))
    versions = folder / "stand-in.map"
    for name in sorted(needed - there):
        versions.write_text(f"{VERSION.get(name, name)} {{ global: *; }};\n", encoding="utf-8")
        command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, f"-Wl,--version-script={versions}"], input=source, text=True, check=True)
    return sorted(needed - there)


def create(environment: Path, changed: list[str]) -> None:
    """Install the pair, the other pins and the package."""
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (environment / "pins.txt").write_text("\n".join(pins(changed)) + "\n", encoding="utf-8")

    def install(*arguments: str) -> None:
        # The variable takes the place of constraints in pip's configuration, which may not know these versions.
        command = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-warn-conflicts"]
        constraint = {"PIP_CONSTRAINT": str(environment / "pins.txt")}
        subprocess.run([*command, *arguments], check=True, env={**os.environ, **constraint})

    install("--no-deps", *(one for one in changed if one.startswith(("torch==", "triton=="))))
    site = next(environment.glob("lib/python*/site-packages"))
    torch = next(iter(distributions(name="torch", path=[str(site)])))
    small = runtime_of(torch)
    if small:
        install("--no-deps", *small)
        print("stand-ins for", *stand_in(site))
    # What torch itself needs of other packages, by name: the versions are free.
    needs = [re.split(r"[\[<>=!~; ]", one)[0] for one in torch.requires or [] if "extra ==" not in one]
    install(*(name for name in needs if not name.startswith(("nvidia-", "cuda-", "triton"))), *requirements())
    install("--no-deps", "-e", ".")


def main(changed: list[str]) -> None:
    """Create the environment unless an earlier run did, then test."""
    os.chdir(ROOT)
    environment = ROOT / "build" / f"pair-{changed[0].partition('==')[2]}"
    ready = environment / ".ready"
    made_of = f"{sys.version}\n{changed}\n{pins(changed)}\n{requirements()}\n"
    if not ready.exists() or ready.read_text(encoding="utf-8") != made_of:
        create(environment, changed)
        ready.write_text(made_of, encoding="utf-8")
    python = str(environment / "bin" / "python")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    workers = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--benchmark-disable"]
    arguments = [*workers, "-q", "-m", "not mutation and not long", *TESTS.split()]
    subprocess.run([python, "-m", "pytest", *arguments], check=True)
    subprocess.run([python, "-m", "tests.standin", "--sizes", "few"], check=True)
    with open(environment / "static.txt", "w", encoding="utf-8") as table:
        static = [python, "-m", "benchmarks", "static", "--arch", "90", "--released"]
        subprocess.run(static, check=True, stdout=table)
    print((environment / "static.txt").read_text(encoding="utf-8").splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
