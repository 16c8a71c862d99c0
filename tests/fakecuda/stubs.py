"""Write C for every CUDA function that the installed PyTorch is linked with and the stub does not define.

    python stubs.py OBJECT... > stubs.c

A generated function records that it was called and returns success, or "not supported" where success would promise
something, such as memory. Needs `nm`; PyTorch is found, not imported.
"""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

CUDA = re.compile(r"(__cuda|cuda[A-Z]|cublas|nccl|cu(?!File)[A-Z])\w*$")
COMPUTES = re.compile(r"cublas(?!Lt|Create|Destroy|Set|Get|Logger)\w+$")
REFUSED = re.compile(r"cuda(Malloc|FreeAsync|Ipc[A-Z]|MemPool|GraphAdd|GraphCond|Library|StreamBeginCaptureTo)\w*$")
NOT_SUPPORTED = 801


def symbols(file: Path, which: str, *options: str) -> set[str]:
    """Names of the functions that `file` defines, or needs from elsewhere."""
    out = subprocess.run(["nm", *options, which, str(file)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in out.splitlines() if line}


def body(name: str) -> str:
    if COMPUTES.match(name):
        return f'int {name}(void *handle) {{ return fakecuda_blas(handle, "{name}"); }}'
    result = NOT_SUPPORTED if REFUSED.match(name) else 0
    return f'int {name}(void) {{ return fakecuda_stub("{name}", {result}); }}'


def main(objects: list[str]) -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"stubs.py: {sys.executable} has no torch")
    package = Path(spec.origin).parent
    cuda = runpy.run_path(str(package / "version.py"))["cuda"]
    if cuda is None:
        sys.exit(f"stubs.py: {package} is a PyTorch without CUDA; the wheel with CUDA is needed, a GPU is not")
    major, minor = (int(part) for part in cuda.split(".")[:2])
    wanted = set().union(*(symbols(file, "--undefined-only", "-D") for file in (package / "lib").glob("lib*.so")))
    defined = set().union(*(symbols(Path(file), "--defined-only") for file in objects))
    print("int fakecuda_stub(const char *, int);\nint fakecuda_blas(void *, const char *);")
    print(f"extern const int fakecuda_cuda_version;\nconst int fakecuda_cuda_version = {1000 * major + 10 * minor};")
    for name in sorted(wanted - defined):
        if CUDA.match(name):
            print(body(name))


if __name__ == "__main__":
    main(sys.argv[1:])
