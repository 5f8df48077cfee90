"""What docs/gpu.md claims, proved or refuted on your card in under ten minutes, and a table for docs/gpu.md.

    python benchmarks/gpu.py                               every section
    python benchmarks/gpu.py --only machine correctness    these alone

Needs what `bash run.sh setup` installs. Nothing is downloaded: weights are random. Without a card all runs on the CPU
with tiny shapes, which proves this program alone. Rows go to stderr as they come, the table to stdout, both to
outputs/gpu.json. What isn't right has a NO, and the exit code is 1. What a section does is in gpu_sections.py.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import cli, files  # noqa: E402

# Seconds that each may take, in a process of its own. This one leaves torch alone, and with it the card.
SECTIONS = {"machine": 40, "correctness": 90, "scripts": 200, "scaler": 40, "llm": 150, "bert": 90, "4bit": 90}
MEASURING = ("machine", "llm", "bert", "4bit")  # a card may be too slow for all of it
LATEST = 480  # seconds after which no section starts


def run_section(name):
    """A section's rows as they come from a process of its own, and one more if that doesn't end well."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(Path(folder) / "said", "w+") as said:
        command, environment = [sys.executable, __file__, "--section", name], os.environ | {"TMPDIR": folder}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment, start_new_session=True
        )
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            code = process.wait()
        finally:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # the scripts that it has started, too
        said.seek(0)
        last = said.read().strip().rpartition("\n")[2]
    if code == -signal.SIGALRM:
        yield {"what": "stopped", "value": f"after {SECTIONS[name]} s", "ok": None if name in MEASURING else False}
    elif code:
        yield {"what": "fault", "value": last or f"exit code {code}", "ok": False}


def as_line(row):
    """A row of a Markdown table."""
    cells = [row["section"], row["what"], row["value"], {True: "yes", False: "NO", None: ""}[row["ok"]]]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main():
    parser = cli.arg_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="NAME", help="sections")
    parser.add_argument("--section", choices=SECTIONS, metavar="NAME", help="run it here: a row of JSON a line")
    args, rows, started = parser.parse_args(), [], time.monotonic()
    if args.section:
        signal.alarm(SECTIONS[args.section])
        return getattr(importlib.import_module("gpu_sections"), f"check_{args.section}")()
    for name in args.only:
        late = {"what": "not started", "value": f"{LATEST} s are over", "ok": None}
        for row in [late] if time.monotonic() - started > LATEST else run_section(name):
            rows.append({"section": name} | row)
            cli.log(as_line(rows[-1]))
            files.write_json(args.out_dir / "gpu.json", rows)
    print("| section | what | found | right |", "| --- | --- | --- | --- |", *map(as_line, rows), sep="\n")
    sys.exit(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    cli.run_script(main)
