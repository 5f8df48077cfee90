"""Broken files, full disks, hostile model directories, no network: one line that helps, and nothing written is lost."""

import codecs
import csv
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import hypothesis.strategies as st
import models
import pytest
import test_convert_chatglm2
import torch
import training
from conftest import KIT, SAMPLE
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

import bert_finetune
import common
from common import InputError

HEADER = ["uuid", "title", "author", "abstract", "Keywords", "label"]
make_dir, sp_model = test_convert_chatglm2.make_dir, test_convert_chatglm2.sp_model

# ---- mutations of real-looking papers --------------------------------------------------------------------------------


def read_sample(count=30):
    """The first papers of the sample, both labels among them: header and rows as a list of lists."""
    with open(SAMPLE / "train.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[: count + 1]


ROWS = read_sample()


def to_bytes(rows, encoding="utf-8", **options):
    text = io.StringIO()
    csv.writer(text, **{"lineterminator": "\n"} | options).writerows(rows)
    return text.getvalue().encode(encoding, "replace")


def by_rows(change):
    """A mutation of bytes from one of cells: `change(rows, rng)` gets and returns a list of lists, header first."""

    def mutate(data, rng):
        text = data.decode("utf-8", "replace")
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error:
            return data
        return to_bytes(change(rows, rng), "utf-8") if len(rows) > 1 and all(rows) else data

    return mutate


def at_random_places(piece, most=5):
    """A mutation that puts `piece` in, once or more."""

    def mutate(data, rng):
        for _ in range(rng.randint(1, most)):
            at = rng.randint(0, len(data))
            data = data[:at] + piece + data[at:]
        return data

    return mutate


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 20) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def take_out(data, rng):
    first, last = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:first] + data[last:] if rng.random() < 0.5 else data[: max(first, 1)]


def drop_quote(data, rng):
    places = [i for i, byte in enumerate(data) if byte == 0x22]
    at = rng.choice(places) if places else 0
    return data[:at] + data[at + 1 :]


def recode(encoding):
    return lambda data, rng: data.decode("utf-8", "replace").encode(encoding, "replace")


def mix(data, rng):
    """Some lines in another encoding than the rest."""
    other = rng.choice(["gb18030", "latin-1", "utf-16-le", "big5", "cp1252"])
    lines = data.decode("utf-8", "replace").splitlines(keepends=True)
    return b"".join(line.encode(other if rng.random() < 0.3 else "utf-8", "replace") for line in lines)


def rewrite(**options):
    """The same cells as another program writes them."""

    def mutate(data, rng):
        try:
            rows = list(csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline="")))
        except csv.Error:
            return data
        return to_bytes(rows, **options)

    return mutate


def change_cell(values, columns=None):
    def change(rows, rng):
        for _ in range(rng.choice([1, 1, 1, 5])):
            row = rng.choice(rows[1:])
            row[rng.randrange(len(row)) if columns is None else min(rng.choice(columns), len(row) - 1)] = rng.choice(
                values
            )
        return rows

    return by_rows(change)


def change_header(rows, rng):
    at = rng.randrange(len(rows[0]))
    rows[0][at] = rng.choice(
        ["", " ", '"', rows[0][at].upper(), f" {rows[0][at]} ", "title", "x", "标题", rows[0][at][:-1]]
    )
    return rows


def drop_column(rows, rng):
    at = rng.randrange(max(map(len, rows)))
    return [row[:at] + row[at + 1 :] for row in rows]


def drop_cell(rows, rng):
    row = rng.choice(rows)
    del row[rng.randrange(len(row))]
    return rows


def add_columns(rows, rng):
    count = rng.choice([1, 3, 1000])
    return [row + [f"{rng.choice(['x', 'note', '', 'title'])}{i}" for i in range(count)] for row in rows]


def lengthen(rows, rng):
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(["word ", "é", "a,", '"', "&amp;"]) * 250_000
    return rows


def repeat_rows(rows, rng):
    return [*rows, *rng.choices(rows, k=rng.randint(1, 3))]


def shuffle_columns(rows, rng):
    order = rng.sample(range(len(rows[0])), len(rows[0]))
    return [[row[i] if i < len(row) else "" for i in order] for row in rows]


def few_rows(rows, rng):
    return [rows[0], *rng.sample(rows[1:], min(len(rows) - 1, rng.randint(0, 12)))]


JUNK = ["", " ", "\t", "2", "01", "1.0", " 0 ", "１", "nan", "True", "a\nb", "a\rb", "\ufeff", "\x1b[2J", "\x85",
        "\u2028", "&#xD800; &#99999999;", f"&#{'9' * 5000};", '"', "=1+1", "é" * 300, "x,y;z", "\x1a", "0"]  # fmt: skip
MUTATIONS = {
    "bytes flipped": flip,
    "bytes taken out": take_out,
    "quote put in": at_random_places(b'"'),
    "quote dropped": drop_quote,
    "NUL": at_random_places(b"\0"),
    "lone CR": at_random_places(b"\r"),
    "blank lines": at_random_places(b"\n\n"),
    "bare commas": at_random_places(b"\n,,,,,\n"),
    "BOM anywhere": at_random_places(codecs.BOM_UTF8),
    "BOM in front": lambda data, rng: codecs.BOM_UTF8 * rng.randint(1, 2) + data,
    "lone surrogate": at_random_places(b"\xed\xa0\x80"),
    "no UTF-8": at_random_places(b"\xff\xfe"),
    "control characters": at_random_places(b"\x1b\x08\x1a\x7f"),
    "foreign white space": at_random_places("\u2028\x85\x0b\x0c\x1c".encode()),
    "blank head": lambda data, rng: rng.choice([b"\n", b" ", b"\r\n", b",,,\n", b" , \n", b"sep=;\n"]) + data,
    "only blanks": lambda data, rng: (
        rng.choice([b",,,\n;;\n", b" , ,\n", b'""\n', b"\t\n \n", b"\r"]) * rng.randint(1, 9)
    ),
    "GB18030": recode("gb18030"),
    "Latin-1": recode("latin-1"),
    "UTF-16": recode("utf-16"),
    "UTF-16 cut": lambda data, rng: recode("utf-16")(data, rng)[: rng.randint(2, 999)],
    "UTF-16 flipped": lambda data, rng: codecs.BOM_UTF16_BE + flip(recode("utf-16-be")(data, rng), rng),
    "UTF-16 without BOM": recode("utf-16-le"),
    "UTF-16 surrogate": lambda data, rng: recode("utf-16")(data, rng) + b"\x00\xd8a\0",
    "UTF-32": recode("utf-32"),
    "encodings mixed": mix,
    "semicolons": rewrite(delimiter=";"),
    "tabs": rewrite(delimiter="\t"),
    "bars": rewrite(delimiter="|"),
    "single quotes": rewrite(quotechar="'"),
    "all quoted": rewrite(quoting=csv.QUOTE_ALL, lineterminator="\r\n"),
    "Mac lines": rewrite(lineterminator="\r"),
    "1 MB cell": by_rows(lengthen),
    "junk cell": change_cell(JUNK),
    "junk uuid": change_cell(JUNK, [0]),
    "junk label": change_cell(JUNK, [5]),
    "header changed": by_rows(change_header),
    "column dropped": by_rows(drop_column),
    "cell dropped": by_rows(drop_cell),
    "columns added": by_rows(add_columns),
    "columns in another order": by_rows(shuffle_columns),
    "rows repeated": by_rows(repeat_rows),
    "few rows": by_rows(few_rows),
    "no header": by_rows(lambda rows, rng: rows[1:]),
}


def mutate(data, steps):
    """Apply a list of (name of a mutation, seed)."""
    for name, seed in steps:
        data = MUTATIONS[name](data, random.Random(seed))
    return data


STEPS = st.lists(st.tuples(st.sampled_from(sorted(MUTATIONS)), st.integers(0, 2**32 - 1)), min_size=1, max_size=3)
ALIKE = [
    "GB18030",
    "UTF-16",
    "semicolons",
    "tabs",
    "bars",
    "all quoted",
    "Mac lines",
    "BOM in front",
]  # the same papers
MANY = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


# ---- reading them ----------------------------------------------------------------------------------------------------


def check_reading(path, labelled):
    """read_papers takes a file whole or refuses it in a line. Returns the frame, or None."""
    started = time.perf_counter()
    try:
        papers = common.read_papers(path, labelled)
    except InputError as error:
        text = str(error).removeprefix(str(path))
        assert text != str(error), "the line begins with the file"
        assert "\n" not in text and text.isprintable() and 10 < len(text) < 500, text
        return None
    finally:
        assert time.perf_counter() - started < 10
    assert {"uuid", "title", "abstract"} <= set(papers) and len(papers)
    assert papers["uuid"].is_unique and papers["uuid"].str.strip().all()
    assert not labelled or set(papers["label"]) == {0, 1}
    return papers


@settings(max_examples=430, **MANY)
@given(STEPS, st.booleans())
def test_papers_are_read_whole_or_refused_in_a_line(tmp_path, steps, labelled):
    path = tmp_path / "papers.csv"
    path.write_bytes(mutate(to_bytes(ROWS), steps))
    papers = check_reading(path, labelled)
    if papers is not None:  # what was read comes back from a plain file
        known = papers[[name for name in HEADER if name in papers]]
        known.to_csv(path, index=False, lineterminator="\n")
        assert common.read_papers(path, labelled).equals(known)


@pytest.mark.parametrize("name", ALIKE)
def test_no_cell_changes_with_the_way_a_file_is_written(tmp_path, name):
    for file, data in (("plain.csv", to_bytes(ROWS)), ("other.csv", mutate(to_bytes(ROWS), [(name, 0)]))):
        (tmp_path / file).write_bytes(data)
    plain, other = (common.read_papers(tmp_path / file, True) for file in ("plain.csv", "other.csv"))
    assert plain.equals(other) and plain["uuid"].tolist() == [row[0] for row in ROWS[1:]]


def test_latin_1_is_not_taken_for_gb18030(tmp_path):
    path = tmp_path / "papers.csv"
    path.write_bytes(to_bytes([HEADER, ["1", "Andréas", "Müller", "naïve", "", "1"]], "latin-1"))
    with pytest.raises(InputError, match="unknown encoding"):
        common.read_papers(path)


def test_a_header_of_a_million_columns_is_refused(tmp_path):
    path = tmp_path / "papers.csv"
    more = [f"c{i}" for i in range(1_000_000)]
    path.write_bytes(to_bytes([[*row, *more] for row in (HEADER, [*"atbck1"], [*"dtbck0"])]))
    with pytest.raises(InputError, match="1000006 columns"):
        common.read_papers(path, True)


def test_a_uuid_with_a_line_break_is_refused(tmp_path):
    path = tmp_path / "papers.csv"
    for broken in ("a\rb", "a\nb"):
        path.write_bytes(f'uuid,title,abstract\n1,t,b\n"{broken}",t,b\n'.encode())
        with pytest.raises(InputError, match="line break in row 3"):
            common.read_papers(path)


def test_a_character_reference_of_many_digits_stays_text(tmp_path):
    title = f"&#{'9' * 5000};"
    (tmp_path / "papers.csv").write_bytes(to_bytes([["uuid", "title", "abstract"], ["1", title, "b"]]))
    assert common.read_papers(tmp_path / "papers.csv")["title"].tolist() == [title]


# ---- predicting from them --------------------------------------------------------------------------------------------


def contents(folder):
    """{path: bytes} of every file under a folder that says something of its own."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if not path.name.startswith((".lock", "partial-"))}


def check_run(done, tmp_path, before):
    """Exit code 0 and a whole submission, or 2, one line and everything as it was."""
    faults = [line for line in done.stderr.splitlines() if line.startswith("baseline.py: ")]
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        with open(tmp_path / "outputs/baseline/submit_task1.csv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert not faults and header == ["uuid", "Keywords", "label"]
        assert [row[0] for row in rows] == common.read_papers(tmp_path / "test.csv")["uuid"].tolist()
        assert {row[2] for row in rows} <= {"0", "1"}
    else:
        assert done.returncode == 2 and len(faults) == 1 and not done.stdout, done.stderr
        assert contents(tmp_path / "outputs") == before


def write_pair(folder, steps, side):
    rows = read_sample(40)
    pair = {"train": to_bytes(rows[:31]), "test": to_bytes([row[:4] for row in rows[:1] + rows[31:]])}
    for name, data in pair.items():
        (folder / f"{name}.csv").write_bytes(mutate(data, steps) if name == side else data)


BASELINE = ["baseline.py", "--train", "train.csv", "--test", "test.csv", "--folds", "2"]


@settings(max_examples=80, **MANY)
@given(STEPS, st.sampled_from(["train", "test"]))
def test_a_submission_is_whole_or_the_earlier_one_stays(kit, tmp_path, steps, side):
    write_pair(tmp_path, steps, side)
    before = contents(tmp_path / "outputs")
    check_run(kit(*BASELINE), tmp_path, before)


@pytest.mark.slow
def test_the_same_as_a_process(tmp_path):
    random_steps = random.Random(7)
    cases = [[], *([(name, random_steps.randrange(99))] for name in random_steps.sample(sorted(MUTATIONS), 4))]
    environment = os.environ | {"OUT_DIR": str(tmp_path / "outputs"), "OMP_NUM_THREADS": "1"}
    for number, steps in enumerate(cases):
        write_pair(tmp_path, steps, ("train", "test")[number % 2])
        before = contents(tmp_path / "outputs")
        command = [sys.executable, KIT / BASELINE[0], *BASELINE[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        check_run(done, tmp_path, before)
        assert steps or done.returncode == 0


# ---- damaged results of earlier runs ---------------------------------------------------------------------------------

DAMAGED = [b"", b"[]", b"5", b"[" * 5000, b"\xff\xfe", b'{"papers": 5}', None]  # None: half of the file


def check_refused(kit, path, *command, told=None):
    """A script that reads a damaged `path` says so in one line, and changes nothing."""
    whole = path.read_bytes()
    for data in DAMAGED:
        path.write_bytes(whole[: len(whole) // 2] if data is None else data)
        before = contents(path.parents[2])
        done = kit(*command)
        faults = [line for line in done.stderr.splitlines() if line.startswith(f"{command[0]}: ")]
        assert done.returncode == 2 and len(faults) == 1 and "Traceback" not in done.stderr, (data, done.stderr)
        assert (told or path.name) in faults[0] and contents(path.parents[2]) == before, (data, faults)
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["baseline/metrics.json", "baseline/valid.csv", "keywords/metrics.json", "keywords/test.csv"]
)
def test_blend_refuses_damaged_results(kit, tmp_path, name):
    assert kit("baseline.py", "--fields", "title", "--folds", "2").returncode == 0
    train, test = common.read_papers(SAMPLE / "train.csv", True), common.read_papers(SAMPLE / "test.csv")
    folder = tmp_path / "outputs" / "keywords"
    common.write_csv(folder / "test.csv", {"uuid": test["uuid"], "Keywords": test["title"]})
    common.write_json(folder / "metrics.json", {"papers": common.paper_record(train, test, 0)})
    (tmp_path / "submit_task1.csv").write_text("earlier")
    check_refused(kit, tmp_path / "outputs" / name, "blend.py", told=name.split("/")[0])


@pytest.mark.slow
def test_finetunes_refuse_damaged_results(kit, tmp_path, tiny_bert, tiny_llm):
    out, few = tmp_path / "outputs", ["--limit", "24", "--fields", "title"]
    train = ["--epochs", "1", "--lr", "0.01", "--max-length"]
    runs = [
        ["make_llm_data.py"],
        ["lora_finetune.py", "--model", tiny_llm, *train, "200"],
        ["lora_predict.py"],
        ["bert_finetune.py", "--model", tiny_bert, *train, "48"],
    ]
    for script, *flags in runs:
        done = kit(script, *flags, *few)
        assert done.returncode == 0, done.stderr
    for name in ("best/kit.json", "best/adapter_config.json", "best/adapter_model.safetensors", "training.json"):
        check_refused(kit, out / "lora" / name, "lora_predict.py", *few, told="lora")
    check_refused(kit, out / "lora" / "metrics.json", "lora_predict.py", *few)
    check_refused(kit, out / "bert" / "metrics.json", "bert_finetune.py", "--predict-only", *few)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        check_refused(kit, out / "bert" / "best" / name, "bert_finetune.py", "--predict-only", *few, told="best")
    for name in ("paper_label.json", "paper_label_valid.json", "paper_label_source.json"):
        command = ["lora_finetune.py", "--model", tiny_llm, *train, "200", "--name", "new"]
        check_refused(kit, out / name, *command, *few, told="paper_label")


@pytest.mark.slow
def test_nothing_of_a_hostile_adapter_is_run_or_read(kit, tmp_path, tiny_llm):
    few = ["--limit", "24", "--fields", "title"]
    assert kit("make_llm_data.py", *few).returncode == 0
    train = ["--model", tiny_llm, "--epochs", "1", "--lr", "0.01", "--max-length", "200"]
    assert kit("lora_finetune.py", *train, *few).returncode == 0
    adapter = shutil.copytree(tmp_path / "outputs" / "lora" / "best", tmp_path / "adapter")
    command = ["lora_predict.py", "--adapter", "adapter", "--name", "new", *few]
    torch.save({"a": Payload(tmp_path / "ran")}, adapter / "adapter_model.bin")  # beside safetensors it isn't read
    (adapter / "evil.py").write_text(CODE.format(base="PretrainedConfig", path=str(tmp_path / "ran")))
    edit_json(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    assert kit(*command).returncode == 0
    shutil.move(adapter / "adapter_model.safetensors", tmp_path / "x.safetensors")
    refusals = [kit(*command)]
    (adapter / "adapter_model.safetensors").symlink_to("../x.safetensors")
    refusals.append(kit(*command))
    for done, words in zip(refusals, ["holds no adapter_model.safetensors", "is a link out of the directory"]):
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


# ---- full disks ------------------------------------------------------------------------------------------------------


@contextmanager
def file_limit(size):
    """No file can grow beyond `size` bytes in here: what is written then fails, at that byte."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_failed(done, script, tmp_path, before):
    """Exit code 2, a line that names a file that the script writes, and every file as it was or whole and new."""
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    found = re.fullmatch(rf"{script}: (\S+): (File too large|No space left on device)", line)
    named = tmp_path / found[1] if found else None  # an absolute path stays what it is
    assert named and (named in before or named.name == ".lock"), line
    after = contents(tmp_path)
    removed = {path.name for path in before.keys() - after.keys()}
    assert not after.keys() - before.keys() and removed <= {"paper_label_source.json"}, "written last, removed first"
    for path, data in after.items():
        if path.name == "metrics.json":  # seconds differ
            assert json.loads(data).keys() == json.loads(before[path]).keys()
        else:
            assert data == before[path], path


@pytest.mark.parametrize("script", ["baseline.py", "make_llm_data.py", "blend.py"])
def test_a_write_that_fails_names_its_file_and_loses_nothing(kit, tmp_path, script):
    if script == "blend.py":
        assert kit("baseline.py").returncode == 0
    earlier = contents(tmp_path)
    assert kit(script).returncode == 0
    before = contents(tmp_path)
    largest = max(len(data) for path, data in before.items() if path not in earlier)
    rng = random.Random(script)
    for size in [0, *(rng.randrange(largest - 1) for _ in range(5))]:
        with file_limit(size):
            done = kit(script)
        check_failed(done, script, tmp_path, before)


@pytest.mark.slow
def test_the_same_of_extract_keywords(kit, tmp_path):
    for name in ("outputs/keywords/test.csv", "outputs/keywords/metrics.json", "submit_task2.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with file_limit(500):
        done = kit("extract_keywords.py", "--limit", "16")
    check_failed(done, "extract_keywords.py", tmp_path, before)


def test_a_full_disk(kit, tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount isn't permitted")
    try:
        assert kit("baseline.py").returncode == 0
        before = contents(tmp_path)
        for left in (0, 4096, 8192):
            (folder / "filler").write_bytes(b"x" * (shutil.disk_usage(folder).free - left))
            done = kit("baseline.py")
            (folder / "filler").unlink()
            check_failed(done, "baseline.py", tmp_path, before)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check_kept(path, write, sizes):
    """A write that fails raises an OSError with the path, and what stood there stays."""
    write(1)
    before = contents(path.parent)
    for size in sizes:
        with file_limit(size), pytest.raises(OSError) as error:
            write(2)
        assert error.value.filename == str(path) and "File too large" in str(error.value)
        assert contents(path.parent) == before and list(path.parent.iterdir()) == [path]


def test_the_last_checkpoint_survives_a_full_disk(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "last.safetensors"

    def write(step):
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        training.save_state(path, model, optimizer, {"step": step})

    check_kept(path, write, [0, 1, 500, 70_001])
    assert training.read_state(path) == {"step": 1}


def test_the_best_model_survives_a_full_disk(tmp_path, tiny_bert):
    tokenizer, model = bert_finetune.load_tokenizer(tiny_bert, 48), bert_finetune.load_model(tiny_bert)
    path = tmp_path / "best"

    def write(step):
        with common.replacing(path) as part:
            tokenizer.save_pretrained(part)
            model.save_pretrained(part)

    sizes = [file.stat().st_size for file in Path(tiny_bert).iterdir()]
    check_kept(path, write, [0, 100, *(size - 1 for size in sorted(sizes)[-2:])])


def test_a_conversion_that_fails_leaves_nothing(make_dir, kit, tmp_path):
    source, *_ = make_dir(shards=2)
    for size in (0, 100, 5000, 30_000):
        with file_limit(size):
            done = kit("convert_chatglm2.py", source, "out")
        assert done.returncode == 2 and done.stderr.splitlines()[-1] == "convert_chatglm2.py: out: File too large"
        assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_written_names_its_file(tmp_path):
    with file_limit(0), pytest.raises(OSError) as error, common.locked(tmp_path / "a" / "b"):
        pass
    assert error.value.filename == str(tmp_path / "a" / "b" / ".lock") and not list(tmp_path.iterdir())


def test_a_kill_between_two_renames_loses_no_checkpoint(tmp_path):
    (tmp_path / ".best.123.old").mkdir()
    (tmp_path / ".best.123.old" / "model.safetensors").write_text("earlier")
    (tmp_path / ".best.123.part").mkdir()
    with common.locked(tmp_path):
        assert (tmp_path / "best" / "model.safetensors").read_text() == "earlier"
        assert not list(tmp_path.glob(".best*"))


@pytest.mark.parametrize(
    "where, lines, code, told",
    [
        ("| head -1 >/dev/null", 100_000, 141, ""),
        (">/dev/full", 1, 2, "-c: stdout: No space left on device\n"),
        (">/dev/full", 100_000, 2, "-c: input/output: No space left on device\n"),
        (">&-", 1, 0, ""),
    ],
)
def test_stdout_that_takes_nothing(where, lines, code, told):
    script = f"import common; common.run_script(lambda: print('line\\n' * {lines}))"
    command = f'"{sys.executable}" -c "{script}" {where}; exit ${{PIPESTATUS[0]}}'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], cwd=KIT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, told)


# ---- models that nobody vouches for ----------------------------------------------------------------------------------


class Payload:
    """Pickled code that would leave a folder behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


CODE = """import os
from transformers import {base}
os.mkdir({path!r})
class Evil({base}):
    model_type = "evil"
"""


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text() if path.is_file() else "{}") | changes))


def pickle_weights(folder, ran):
    (folder / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.weight": Payload(ran)}, folder / "pytorch_model.bin")


def pickle_shard(folder, ran):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Payload(ran)}, folder / "a.bin")
    edit_json(folder / "pytorch_model.bin.index.json", metadata={}, weight_map={"a": "a.bin"})


def code_for_the_model(folder, ran):
    (folder / "evil.py").write_text(CODE.format(base="PretrainedConfig", path=str(ran)))
    classes = {
        name: "evil.Evil" for name in ("AutoConfig", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    }
    edit_json(folder / "config.json", model_type="evil", auto_map=classes)


def code_for_the_tokenizer(folder, ran):
    (folder / "evil.py").write_text(CODE.format(base="PreTrainedTokenizerFast", path=str(ran)))
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink(missing_ok=True)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]})


def name_that_climbs(folder, ran):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "../x.safetensors"})


def name_from_the_root(folder, ran):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    weight_map = {"a": str(folder.parent / "x.safetensors")}
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)


def explicit_name_that_climbs(folder, ran):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    edit_json(folder / "config.json", transformers_weights="../x.safetensors")


def link_that_climbs(folder, ran):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / "model.safetensors").symlink_to("../x.safetensors")


def linked_config(folder, ran):
    shutil.move(folder / "config.json", folder.parent / "x.json")
    (folder / "config.json").symlink_to(folder.parent / "x.json")


def adapter_of_another_model(folder, ran):
    shutil.copytree(folder, folder.parent / "other")
    (folder / "config.json").unlink()
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(folder.parent / "other"), peft_type="LORA")


def kernel_of_the_hub(folder, ran):
    edit_json(folder / "config.json", attn_implementation="evil/kernel")


def config_is_a_list(folder, ran):
    (folder / "config.json").write_text("[1]")


HOSTILE = [
    pickle_weights,
    pickle_shard,
    code_for_the_model,
    code_for_the_tokenizer,
    name_that_climbs,
    name_from_the_root,
]
HOSTILE += [explicit_name_that_climbs, link_that_climbs, linked_config, adapter_of_another_model, kernel_of_the_hub]
HOSTILE += [config_is_a_list]


@pytest.mark.parametrize("script", ["bert_finetune.py", "lora_finetune.py"])
@pytest.mark.parametrize("spoil", HOSTILE)
def test_nothing_of_a_hostile_model_is_run_or_read(kit, tmp_path, tiny_bert, tiny_llm, script, spoil):
    folder = shutil.copytree(tiny_bert if script == "bert_finetune.py" else tiny_llm, tmp_path / "model")
    spoil(folder, tmp_path / "ran")
    assert kit("make_llm_data.py", "--fields", "title").returncode == 0
    done = kit(script, "--model", "model", "--max-length", "48", "--fields", "title")
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if "model" in line] == done.stderr.splitlines()[-1:]
    assert done.stderr.splitlines()[-1].startswith(f"{script}: ") and not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_needs_none_is_not_run(tmp_path, tiny_bert):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "evil.py").write_text(CODE.format(base="BertConfig", path=str(tmp_path / "ran")))
    edit_json(
        folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.M"}
    )
    (folder / "pytorch_model.bin").write_bytes(b"x")  # beside safetensors it isn't read
    bert_finetune.load_tokenizer(str(folder), 48)
    bert_finetune.load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_old_weights_without_code_are_read(tmp_path, tiny_bert):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = bert_finetune.load_model(str(folder)).bert.state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in tensors.items())


def test_links_of_the_hubs_cache_are_in_order(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    (blobs / "ab12").write_text("{}")
    (tmp_path / "models--a--b" / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    (snapshot / "onnx" / "config.json").symlink_to("../../../blobs/ab12")
    (tmp_path / "elsewhere").symlink_to(snapshot)  # the directory itself may be a link
    models.check_folder(snapshot)
    models.check_folder(tmp_path / "elsewhere")
    (snapshot / "more.json").symlink_to("../../secret")
    with pytest.raises(InputError, match="more.json is a link"):
        models.check_folder(snapshot)


def test_nothing_of_a_hostile_chatglm2_is_run_or_read(make_dir, kit, tmp_path):
    (tmp_path / "in").mkdir()
    make_dir(folder=tmp_path / "in", shards=1)
    (tmp_path / "in" / "modeling_chatglm.py").write_text(CODE.format(base="BertConfig", path=str(tmp_path / "ran")))
    shutil.move(tmp_path / "in" / "pytorch_model.bin", tmp_path / "x.bin")
    (tmp_path / "in" / "pytorch_model.bin").symlink_to("../x.bin")
    done = kit("convert_chatglm2.py", "in", "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "pytorch_model.bin is a link" in done.stderr
    os.replace(tmp_path / "x.bin", tmp_path / "in" / "pytorch_model.bin")
    assert kit("convert_chatglm2.py", "in", "out").returncode == 0 and not (tmp_path / "ran").exists()


FORBIDDEN = r"trust_remote_code\W+True|pickle\.loads?\(|weights_only\W+False|(?<!\.)\b(eval|exec)\(|os\.(system|popen)"


def test_the_kit_calls_nothing_that_runs_data():
    for path in [*KIT.glob("*.py"), *KIT.glob("benchmarks/*.py")]:
        code = path.read_text(encoding="utf-8")
        assert not re.search(FORBIDDEN + r"|shell\W*=\W*True", code), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", code)), path


# ---- no network ------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_hub():
    """(address, socket) of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", server


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("silent", marks=pytest.mark.slow),
        "http://localhost:9",
        "http://10.255.255.1",
        "http://no.such.host.invalid",
    ],
)
def test_the_hub_is_asked_once_and_not_for_long(tmp_path, silent_hub, address):
    environment = os.environ | {"HF_ENDPOINT": silent_hub[0] if address == "silent" else address}
    script = (
        "import time, models; start = time.time(); options = models.hub_options('a/b'), models.hub_options('a/b'); "
    )
    script += "print(time.time() - start, options[1])"
    done = subprocess.run([sys.executable, "-c", script], cwd=KIT, env=environment, capture_output=True, text=True)
    seconds, options = done.stdout.split(maxsplit=1)
    assert float(seconds) < 9 and "'local_files_only': True" in options and not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model"),
    [("bert_finetune.py", "bert-base-uncased"), ("lora_finetune.py", "Qwen/Qwen3-4B-Instruct-2507")],
)
def test_a_hub_out_of_reach_is_one_line(kit, tmp_path, silent_hub, script, model):
    assert kit("make_llm_data.py").returncode == 0
    address, server = silent_hub
    environment = os.environ | {"OUT_DIR": str(tmp_path / "outputs"), "DATA_DIR": str(SAMPLE), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, KIT / script, "--model", model]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"{script}: --model {model} can't be loaded"), done.stderr
    assert "HF_ENDPOINT" in line and "Traceback" not in done.stderr
    server.setblocking(False)
    asked = []
    with suppress(BlockingIOError):
        while True:
            asked.append(server.accept()[0].recv(999))
    assert sum(f"/api/models/{model} ".encode() in request for request in asked) == 1 and len(asked) <= 2, asked
