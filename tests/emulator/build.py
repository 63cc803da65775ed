"""Compiles the package's CUDA C++ files for the host, as shared libraries that run them block by block.

The text of a kernel is compiled as it is, but for three things: includes are resolved, asm statements are translated
(``ptx.py``), and the declaration of dynamic shared memory becomes a pointer. The rest is up to headers (``shim.h``).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from emulator.ptx import translate
from kvfold.ops.cuda import runtime

HERE = Path(__file__).parent
HEADERS = ("block.h", "shim.h", "ptx.h")
FLAGS = (
    "-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fvisibility=hidden", "-fno-strict-aliasing", "-fwrapv",
    "-U_FORTIFY_SOURCE", "-shared", "-fPIC",
)  # fmt: skip

_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+(?:void\s+|__launch_bounds__\([^()]*\)\s*)+(\w+)\(')
_EXPORTS = """\
EXPORT const char* launch_{entry}(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared_bytes,
                                  unsigned schedule, bool early, void** arguments) {{
    return host::launch({entry}, {{x, y, z}}, threads, shared_bytes, schedule, early, arguments);
}}
EXPORT int parameters_{entry}(size_t* to) {{ return host::parameter_sizes({entry}, to); }}"""
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s+(\w+)\[\];")


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """The system's C++ compiler."""
    wanted = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in wanted if name and (path := shutil.which(name))), None)


@lru_cache(maxsize=1)
def _version(path: str) -> str:
    return subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=False).stdout


def unavailable() -> str | None:
    """Why kernels cannot be emulated on this machine, or None if they can."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return f"the emulator is for Linux and little-endian machines, not {platform.platform()}"
    return None if compiler() else "there is no C++ compiler (g++ or clang++) to compile CUDA kernels for the host"


def _in_order(file: str, texts: dict[str, str]) -> list[str]:
    """The files of a translation unit, headers before those that include them."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in order:
            for header in re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', texts[name], re.MULTILINE):
                add(header)
            order.append(name)

    add(file)
    return order


def translation_unit(file: str, defines: runtime.Defines, layouts: dict[str, tuple[str, ...]]) -> str:
    """C++ for the kernels of a file of the package.

    Args:
        defines: Macros.
        layouts: Structs whose layout can be asked for: for each, expressions that name its members.
    """
    texts = runtime.sources(file)
    lines = ['#include "ptx.h"', *(f"#define {name} {value}" for name, value in defines)]
    for name in _in_order(file, texts):
        text = re.sub(r'^[ \t]*#[ \t]*(include[ \t]+"|pragma[ \t]+once)', r"// \g<0>", texts[name], flags=re.MULTILINE)
        text = _DYNAMIC_SHARED.sub(r"\1* const \2 = (\1*)host::dynamic_shared;", text)
        lines += [f'#line 1 "{name}"', translate(text, name)]
    tables = "".join(
        f'    if (!strcmp(type, "{name}")) {{ const size_t all[] = {{sizeof({name}), '
        + ", ".join(f"offsetof({name}, {member})" for member in members)
        + "}; memcpy(to, all, sizeof all); return 1; }\n"
        for name, members in layouts.items()
    )
    lines += [
        '#line 1 "exports"',
        '#define EXPORT extern "C" __attribute__((visibility("default")))',
        *(_EXPORTS.format(entry=entry) for entry in _KERNEL.findall(texts[file])),
        f"EXPORT int structure_layout(const char* type, size_t* to) {{\n{tables}    return 0;\n}}",
        "",
    ]
    return "\n".join(lines)


def build(file: str, defines: runtime.Defines, layouts: dict[str, tuple[str, ...]]) -> Path:
    """Compile a file, or find it compiled. Libraries are kept in the system's temporary folder, by content.

    Raises:
        RuntimeError: The compiler refuses; with what it says.
    """
    path = compiler()
    if path is None:
        raise RuntimeError(unavailable())
    text = translation_unit(file, defines, layouts)
    digest = hashlib.sha256("\0".join([path, _version(path), platform.machine(), *FLAGS, text]).encode())
    for header in HEADERS:
        digest.update((HERE / header).read_bytes())
    folder = Path(tempfile.gettempdir()) / f"kvfold-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(
            f"{folder} belongs to somebody else, whose libraries are not loaded; remove it or set TMPDIR"
        )
    library = folder / f"{Path(file).stem}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as work:  # renamed when complete: others build the same
        source, made = Path(work, f"{library.stem}.cpp"), Path(work, library.name)
        source.write_text(text, encoding="utf-8")
        command = [path, *FLAGS, f"-I{HERE}", "-o", str(made), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{path} does not compile {file} for the host:\n{result.stderr[:4000]}")
        made.replace(library)
    return library
