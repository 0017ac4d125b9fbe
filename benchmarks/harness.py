"""Timing of two or more functions against each other in one process on CPU, peak memory, and the JSON record of a row.

Times are given as ratios of interleaved pairs: the machine's speed drifts, the ratio of two runs made one after the
other does not.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PEER = "peer"
ROWS: dict[str, Callable[[int], dict]] = {}


class PeerMissing(RuntimeError):
    """A row's peer is a package that is not installed; `benchmarks.run` skips the row and keeps its last results."""


def row(name: str) -> Callable:
    """Register a function `(pairs) -> {"description", "peer", "metrics"}` as the benchmark row `name`.

    `metrics` maps a name to what `compare` or `compare_memory` gives, with a target where one is set (`with_target`).
    """

    def register(function: Callable[[int], dict]) -> Callable[[int], dict]:
        if name in ROWS:
            raise ValueError(f"benchmark row {name!r} is registered twice; give the second another name.")
        ROWS[name] = function
        return function

    return register


def compare(functions: dict[str, Callable[[], object]], pairs: int = 5, threads: int = 1, warmup: int = 1) -> dict:
    """Time every function `pairs` times, one after the other, in turning order.

    With one thread the clock is the processor time of the process, which on a quiet machine is the wall time and on a
    shared one leaves out what other jobs took; with more threads it is the wall time.

    Args:
        functions: "peer" and any number of others.
        pairs: rounds in which each function runs once.
        threads: of torch, restored afterwards.
        warmup: rounds before the first one that counts.

    Returns:
        {name: {"ms": median, "ms_min", "ms_max", and but for the peer "ratio": median of (own time / peer's time of
        the same round), "ratio_min", "ratio_max", "pairs"}}.
    """
    if PEER not in functions or pairs < 1:
        raise ValueError(
            f"compare needs a function named {PEER!r} and at least one pair, got {list(functions)}, {pairs} pairs."
        )
    names = list(functions)
    times = {name: [] for name in names}
    clock = time.process_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(warmup + pairs):
            for name in names if turn % 2 == 0 else reversed(names):
                start = clock()
                functions[name]()
                if turn >= warmup:
                    times[name].append((clock() - start) * 1000)
    finally:
        torch.set_num_threads(before)
    report = {}
    for name, own in times.items():
        report[name] = {"ms": statistics.median(own), "ms_min": min(own), "ms_max": max(own)}
        if name != PEER:
            ratios = [mine / theirs for mine, theirs in zip(own, times[PEER])]
            report[name] |= {
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "pairs": pairs,
            }
    return report


def compare_memory(functions: dict[str, Callable[[], object]]) -> dict:
    """{name: {"mb": peak of one call after one warm-up call, and but for the peer "ratio"}}."""
    peaks = {}
    for name, function in functions.items():
        function()
        peaks[name] = peak_memory(function) / 2**20
    return {
        name: {"mb": peak} | ({} if name == PEER else {"ratio": peak / peaks[PEER]}) for name, peak in peaks.items()
    }


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held during the call over what it held before, from the profiler's
    events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def with_target(result: dict, target: float, quantity: str = "ratio") -> dict:
    """The result of one function with the most that a quantity of it may be, and whether it is not more."""
    return result | {"target": target, "target_of": quantity, "passed": result[quantity] <= target}


def environment(threads: int = 1) -> dict:
    """What a number depends on: versions, processor, threads, date, revision."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpu": _processor(),
        "threads": threads,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": _revision(),
    }


def run_row(name: str, pairs: int, folder: Path = RESULTS) -> dict:
    """Run a registered row and write `<folder>/<name>.json`. Returns what was written."""
    if name not in ROWS:
        raise ValueError(f"no benchmark row is called {name!r}; there are {', '.join(sorted(ROWS))}.")
    start = time.perf_counter()
    report = ROWS[name](pairs)
    record = {"row": name, "command": f"python -m benchmarks.run {name} --pairs {pairs}"} | report | environment()
    record["seconds"] = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(_rounded(record), indent=2) + "\n")
    return record


def _rounded(value):
    """Four significant digits, which is more than a timing has."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _revision() -> str:
    """Commit of the repository, "+changes" if files differ from it; "unknown" outside a repository or before the first
    commit."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"
