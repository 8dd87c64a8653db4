"""Run one stage of the quickstart: its output goes to a log, its steps to a progress bar.

    python examples/quickstart/progress.py NAME LOG [METRICS STEPS] -- COMMAND...

METRICS is the file that verl's file logger writes. If the command fails, the end of its log is shown.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

SHOWN = {"hpd/loss": "loss", "hpd/reverse_kl_k1": "KL", "train/loss": "loss"}


def last_step(metrics: Path) -> tuple[int, dict[str, float]]:
    """Number and shown metrics of the last training step that the file holds in full."""
    for line in reversed(metrics.read_text().splitlines() if metrics.exists() else []):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        shown = {short: entry["data"][name] for name, short in SHOWN.items() if name in entry["data"]}
        if shown:
            return int(entry["step"]), shown
    return 0, {}


def main() -> None:
    split = sys.argv.index("--")
    (name, log, *rest), command = sys.argv[1:split], sys.argv[split + 1 :]
    start = time.monotonic()
    print(f"[{name}] log in {log}", flush=True)
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            if rest:
                metrics, total = Path(rest[0]), int(rest[1])
                with tqdm(
                    total=total, desc=f"[{name}]", unit="step", mininterval=1 if sys.stderr.isatty() else 20
                ) as bar:
                    while process.poll() is None:
                        step, shown = last_step(metrics)
                        bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items()}, refresh=False)
                        bar.update(step - bar.n)
                        time.sleep(0.5)
                    bar.update(last_step(metrics)[0] - bar.n)
            process.wait()
        finally:
            process.terminate()
    if process.returncode != 0:
        print(*Path(log).read_text().splitlines()[-30:], sep="\n", file=sys.stderr)
        sys.exit(f"[{name}] failed with exit code {process.returncode}; log in {log}")
    print(f"[{name}] {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
