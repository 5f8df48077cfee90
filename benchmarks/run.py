"""This kit against what one would otherwise run: scores, speed and memory, side by side in one go on one machine.

    python benchmarks/run.py --train train.csv --test test.csv            all but ablations -> results.json, READMEs
    python benchmarks/run.py --train ... --test ... --only bert keywords  these cases or groups; finished ones anew
    python benchmarks/run.py --train ... --test ... --only ablations      what each part of the kit is worth
    python benchmarks/run.py --write-readme                               the READMEs' tables again, from the results

The peers are installed by benchmarks/requirements.txt; one that isn't there is left out with a line. Each peer runs in
a process of its own on the CPU, in turn within a round, on the same papers with the same weights; loading a model isn't
timed. Another round means another seed: of the split, of new weights, of the order.

A case that is finished is kept, and a run that was stopped goes on where it was, unless the files changed. Labels of
the test papers are read from test_labels.csv beside the test file, where there is one.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
KIT = HERE.parent
sys.path.insert(0, str(KIT))

import tables  # noqa: E402

import common  # noqa: E402

# Of each case its module, and how many papers it learns from and, of test and of held-out ones each, asks for (None:
# all), chosen so that three rounds take minutes on two cores.
CASES = {
    "baseline": ("words", None, None),
    "bert-train": ("bert", 24, None),
    "bert-predict": ("bert", 64, None),
    "bert-score": ("bert", 200, 100),
    "lora-train": ("lora", 16, None),
    "lora-predict": ("lora", 16, None),
    "keywords": ("words", None, 100),
    "ablation-baseline": ("words", None, None),
    "ablation-bert": ("bert", 200, 100),
}
NEEDS = {"fasttext": "fasttext", "setfit": "setfit", "keybert": "keybert", "yake": "yake"}  # peer: module
READMES = ("README.md", "README.zh-CN.md")


def describe_machine():
    """Processor, cores, versions, and GFLOP/s of a product of two fp32 matrices of 2048 x 2048, the best of 5."""
    import torch

    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        times.append(time.perf_counter() - started)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"Python": sys.version.split()[0]}
    for package in sorted({name for names in tables.VERSIONS.values() for name in names}):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": names[0] if names else "unknown processor",
        "cores": os.cpu_count(),
        "matmul_gflops": round(5 * 2 * 2048**3 / min(times) / 1e9, 1),
        "versions": versions,
    }


def run_one(case, peer, args):
    """One peer of a case, once, in this process. Returns a dict of what was measured."""
    module, learn, ask = CASES[case]
    args.learn, args.ask = (args.limit, args.limit) if args.limit else (learn, ask)
    row = importlib.import_module(module).CASES[case][peer](args)
    if "fields" not in row:  # speed alone is measured on the first papers of the training file
        import papers

        row |= {"learn": row["papers"], "fields": papers.first_papers(args)[1]}
    row |= {"papers_per_second": row["papers"] / row["seconds"], "peak_memory_mb": common.peak_memory_mb()}
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def call(args, *one):
    """Run this program for one peer, in a process of its own. Returns (what it measured or None, why it failed)."""
    command = [sys.executable, __file__, "--train", args.train.resolve(), "--test", args.test.resolve()]
    command += ["--limit", args.limit] if args.limit else []
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*map(str, command), "--one", *map(str, one)], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), None
    if done.returncode < 0:
        return None, f"killed by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
    return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def describe_files(args):
    """{"train" and "test": name, number of papers and fingerprint}. Raises InputError for what can't be used."""
    frames = {"train": common.read_papers(args.train, labelled=True), "test": common.read_papers(args.test)}
    return {name: {"papers": len(frame), "fingerprint": common.fingerprint(frame)} for name, frame in frames.items()}


def measure(case, args, machine, results):
    """Run what is missing of a case, round by round and its peers in turn, so that a slow minute hits all of them.
    Results are written after each run. Returns the number of runs that failed.
    """
    found, failed = results[case], 0
    peers = []
    for peer in tables.PEERS[case]:
        if find_spec(NEEDS.get(peer, "json")):
            peers.append(peer)
            found["runs"].setdefault(peer, [])
        else:
            common.log(f"{case}: {peer} left out, it is not installed: pip install -r benchmarks/requirements.txt")
    for number in range(1, args.rounds + 1):
        for peer in peers:
            if any(row["round"] == number for row in found["runs"][peer]):
                continue
            common.log(f"{time.strftime('%H:%M:%S')} {case}, round {number} of {args.rounds}, {peer} ...")
            started = time.perf_counter()
            row, why = call(args, case, peer, number)
            if why:
                failed += 1
                common.log(f"{case}: {peer} failed in round {number}: {why}")
                continue
            found["runs"][peer].append({"round": number, **row})
            found["machine"] = machine
            common.write_json(args.results, results)
            said = [f"{name} {row[name]:.3f}" for name in row if name.endswith(("accuracy", "f1"))]
            said += [f"{row['papers_per_second']:.2f} papers/s, {row['peak_memory_mb']:.0f} MiB"]
            common.log(f"    {'  '.join(said)}; {time.perf_counter() - started:.0f} s with loading")
    return failed


def is_finished(found, rounds):
    """Whether every peer has all of its rounds."""
    wanted = set(range(1, rounds + 1))
    return all(wanted <= {row["round"] for row in rows} for rows in found["runs"].values())


def open_case(case, args, settings, machine, results):
    """Make ready what is to be measured of a case. Returns False where nothing is: it is finished and wasn't named."""
    found = results.get(case, {})
    same = all(found.get(key) == value for key, value in settings.items())
    if same and is_finished(found, args.rounds):
        if not args.only:
            common.log(f"{case}: kept, finished earlier (--only {case} measures it anew)")
            return False
        same = False
    if not same:
        results[case] = settings | {"machine": machine, "runs": {}}
    return True


def write_readmes(results):
    """Make the tables of the READMEs anew."""
    for language, name in enumerate(READMES):
        text = (KIT / name).read_text(encoding="utf-8")
        with common.replacing(KIT / name) as part:
            part.write_text(tables.insert(text, results, language), encoding="utf-8")
    common.log(f"wrote the tables of {' and '.join(READMES)}")


def parse_args():
    parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sample = KIT / "data" / "sample"
    add("--train", type=Path, default=sample / "train.csv", metavar="FILE", help="with labels, default: the sample")
    add("--test", type=Path, default=sample / "test.csv", metavar="FILE", help="default: the sample")
    add("--only", nargs="+", metavar="CASE", help=f"of {', '.join([*tables.BLOCKS, *CASES])}")
    add("--rounds", type=common.whole, default=3, metavar="N", help="default %(default)s")
    add("--limit", type=common.whole, metavar="N", help="papers to learn from, and of test and of held-out ones to ask "
        "for, instead of each case's own number")  # fmt: skip
    add("--results", type=Path, default=HERE / "results.json", metavar="FILE", help="default %(default)s; the README's "
        "tables are made of this one alone")  # fmt: skip
    add("--write-readme", action="store_true", help="only make the README's tables anew")
    add("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.only or () if name not in (*tables.BLOCKS, *CASES)]:
        parser.error(f"--only {common.some(unknown)}: want of {', '.join([*tables.BLOCKS, *CASES])}")
    return args


def main():
    args = parse_args()
    if args.one:
        case, *rest = args.one
        if case == "machine":
            print(json.dumps(describe_machine()))
            return
        args.round = int(rest[1])
        print(json.dumps(run_one(case, rest[0], args)))
        return
    default = args.results.resolve() == HERE / "results.json"
    results = common.read_json(args.results)
    failed = 0
    if not args.write_readme:
        names = args.only or [block for block in tables.BLOCKS if block != "ablations"]
        asked = [case for name in names for case in tables.BLOCKS.get(name, (name,))]
        settings = {"files": describe_files(args), "limit": args.limit}
        machine, why = call(args, "machine")
        if why:
            sys.exit(f"run.py: {why}")
        for case in CASES:
            if case in asked and open_case(case, args, settings, machine, results):
                failed += measure(case, args, machine, results)
    if default:
        write_readmes(results)
    if failed:
        sys.exit(f"run.py: {failed} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    common.run_script(main)
