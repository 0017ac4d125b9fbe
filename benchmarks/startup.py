"""Row for the processor time that `import bestiary` adds to the imports it cannot do without."""

import statistics
import subprocess
import sys

from .harness import row, with_target


CHILD = """
import time
start = time.process_time()
import torch
from transformers import PreTrainedModel
middle = time.process_time()
import bestiary
print(middle - start, time.process_time() - middle)
"""


@row("import_time")
def import_time(pairs: int) -> dict:
    subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True)  # fills the disk cache
    base, extra = zip(*(_seconds() for _ in range(pairs)))
    ratios = [1 + added / needed for needed, added in zip(base, extra)]
    ours = {
        "ms": 1000 * statistics.median(map(sum, zip(base, extra))),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "extra_seconds": statistics.median(extra),
        "pairs": pairs,
    }
    return {
        "description": f"import bestiary, {pairs} new processes",
        "peer": "import torch and transformers.PreTrainedModel, in the same process",
        "metrics": {
            "time": {
                "peer": {"ms": 1000 * statistics.median(base)},
                "ours": with_target(ours, 0.3, "extra_seconds"),
            }
        },
    }


def _seconds() -> tuple[float, float]:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    base, extra = child.stdout.split()[-2:]
    return float(base), float(extra)
