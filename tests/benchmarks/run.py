"""All benches of this folder, or those named: `python tests/benchmarks/run.py [convert clean ...]`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    benches = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    chosen = sys.argv[1:] or list(benches)
    if unknown := [name for name in chosen if name not in benches]:
        sys.exit(f"no bench {unknown[0]!r}; there are: {', '.join(benches)}")
    failed = [name for name in chosen if subprocess.run([sys.executable, str(benches[name])]).returncode != 0]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
