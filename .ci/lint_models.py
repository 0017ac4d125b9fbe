"""Check configuration/ and modeling/ with transformers' own model linter.

The linter reads only `modeling_*.py` and `configuration_*.py`, so the shared layers are shown to it under such names.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


OFF = {
    "TRF028": "licence header in every file: ours stands once, in LICENSE",
    "TRF038": "test file under tests/models/<model>/: ours are tests/test_<slug>.py",
    "TRF041": "no branch on a configuration field without naming checkpoints: a paper's ablations are such branches",
    "TRF051": "no comparison with the name of the attention backend: packed rows need another mask form for each",
    "TRF057": "@auto_docstring: our docstrings are written by hand",
}


def main() -> int:
    """Print the findings and return 1 if there are any."""
    root = Path(__file__).resolve().parents[1]
    sources = {}
    for folder in ("configuration", "modeling"):
        for path in sorted((root / folder).rglob("*.py")):
            if path.name != "__init__.py":
                sources[path.name if path.name.startswith(f"{folder}_") else f"{folder}_{path.name}"] = path
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in sources.items():
            shutil.copy(path, Path(temporary, name))
        report = Path(temporary, "report.json")
        command = [
            sys.executable,
            "-m",
            "mlinter",
            "--no-progress",
            "--no-cache",
            "--output-json",
            str(report),
            temporary,
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            print(run.stdout + run.stderr)
            return 1
        findings = [finding for finding in json.loads(report.read_text())["findings"] if finding["rule"] not in OFF]
    for finding in findings:
        path = sources[Path(finding["path"]).name].relative_to(root)
        print(f"{path}:{finding['line']}: {finding['message']}")
    print(f"mlinter: {len(sources)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
