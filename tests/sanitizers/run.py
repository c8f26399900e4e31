"""Runs the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, warnings as errors.

usage: python tests/sanitizers/run.py [capability ...]

Each sanitizer must also notice a driver that is broken on purpose. Exit status: 0 if everything holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "csrc" / "cpu"
COMPILER = os.environ.get("CXX", "c++")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
FLAGS = [
    "-O1",
    "-g",
    "-std=c++20",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-DCEM_FAST_SMALLEST_TASK=1",
    *WARNINGS,
    f"-I{KERNELS}",
]

# Sanitizer: compiler flags, what a broken driver does, and what the report must then say.
SANITIZERS = {
    "address,undefined": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], 1, "heap-buffer-overflow"),
    "thread": (["-fsanitize=thread"], 2, "data race"),
}
# The first report ends the run.
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def compile_all(sanitizer: list[str], mutation: int, folder: Path) -> tuple[Path, Path]:
    """Builds the driver and its broken twin; returns both programs."""
    sources = [source for source in sorted(KERNELS.glob("*.cpp")) if source.name != "register.cpp"]
    jobs = [(source, folder / f"{source.stem}.o", []) for source in sources]
    jobs += [(HERE / "driver.cpp", folder / f"driver{m}.o", [f"-DCEM_FAST_MUTATION={m}"]) for m in (0, mutation)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda job: subprocess.run(
                    [COMPILER, *FLAGS, *sanitizer, *job[2], "-c", str(job[0]), "-o", str(job[1])], check=True
                ),
                jobs,
            )
        )
    programs = []
    for m in (0, mutation):
        objects = [str(folder / f"{source.stem}.o") for source in sources] + [str(folder / f"driver{m}.o")]
        programs.append(folder / f"driver{m}")
        subprocess.run([COMPILER, *sanitizer, *objects, "-pthread", "-o", str(programs[-1])], check=True)
    return programs[0], programs[1]


def main() -> int:
    failures, runs = 0, 0
    for name, (sanitizer, mutation, report) in SANITIZERS.items():
        with tempfile.TemporaryDirectory() as folder:
            right, broken = compile_all(sanitizer, mutation, Path(folder))
            for capability in sys.argv[1:] or ("default", "avx2", "avx512"):
                result = subprocess.run([right, capability], capture_output=True, text=True, env=ENVIRONMENT)
                if result.returncode == 2:
                    print(f"{name}: {capability} is not available on this processor: not run")
                    continue
                runs += 1
                failures += result.returncode != 0
                print(f"{name}: {result.stdout.strip()}{'' if result.returncode == 0 else ' FAILED'}", flush=True)
                if result.returncode != 0:
                    print(result.stderr)
            result = subprocess.run([broken, "default"], capture_output=True, text=True, env=ENVIRONMENT)
            noticed = result.returncode != 0 and report in result.stderr
            runs += 1
            failures += not noticed
            print(f"{name}: broken driver {'noticed' if noticed else 'NOT noticed'}", flush=True)
    print(f"{runs} runs, {failures} failures")
    return int(failures > 0 or runs == 0)


if __name__ == "__main__":
    sys.exit(main())
