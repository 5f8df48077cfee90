"""Broken files, full disks, hostile models, a hub that fails: one line that helps, and nothing written is lost."""

import codecs
import csv
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
from conftest import KIT, SAMPLE, contents, edit_json
from hypothesis import HealthCheck, given, settings

import common
from lib import hub, results
from lib.cli import InputError

# ---- damaged papers --------------------------------------------------------------------------------------------------


def to_rows(data):
    """The cells of a CSV file's bytes, a list of lists; [] if they are too damaged."""
    try:
        return list(csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline="")))
    except csv.Error:
        return []


def to_bytes(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "replace")


def flip_bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 20) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    first, last = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:first] + data[last:] if rng.random() < 0.5 else data[: max(first, 1)]


def put_in(data, rng):
    pieces = [b'"', b"\0", b"\r", b"\n\n", b"\n,,,,,\n", b"\xff\xfe", codecs.BOM_UTF8, b"\xed\xa0\x80", b"\x1b\x1a\x7f"]
    piece = rng.choice([*pieces, "\u2028\x85\x0b\x0c\x1c".encode(), b'","', b"sep=;\n", b"\\"])
    for at in rng.choices([0, *range(len(data))], k=rng.randint(1, 5)):
        data = data[:at] + piece + data[at:]
    return data


def drop_quote(data, rng):
    places = [i for i, byte in enumerate(data) if byte == 0x22] or [0]
    at = rng.choice(places)
    return data[:at] + data[at + 1 :]


def recode(data, rng):
    encodings = ["gb18030", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "big5"]
    return data.decode("utf-8", "replace").encode(rng.choice(encodings), "replace")


def mix_encodings(data, rng):
    lines = data.splitlines(keepends=True)
    return b"".join(recode(line, rng) if rng.random() < 0.3 else line for line in lines)


JUNK = ["", " ", "2", "01", "1.0", "１", "nan", "True", "1E+15", "a\nb", "a\rb", "\ufeff", "\x1b[2J", "&#xD800;", "<p>",
        f"&#{'9' * 5000};", '"', "=1+1", "x,y;z", "title", "标题", "word " * 50_000]  # fmt: skip


def change_cells(data, rng):
    rows = to_rows(data)
    for row in rng.choices(rows, k=rng.choice([1, 1, 5])) if rows else []:
        if row:
            row[rng.randrange(len(row))] = rng.choice(JUNK)
    return to_bytes(rows)


def change_shape(data, rng):
    """Cells, columns and rows dropped, repeated or in another order."""
    rows = to_rows(data)
    if not rows or not all(rows):
        return data
    at, kind = rng.randrange(len(rows[0])), rng.randrange(5)
    if kind == 0:
        rng.choice(rows).pop()
    elif kind == 1:
        rows = [row[:at] + row[at + 1 :] for row in rows]
    elif kind == 2:
        rows = [[*row, f"x{i}", *row[:at]] for i, row in enumerate(rows)]
    elif kind == 3:
        rows += rng.choices(rows, k=rng.randint(1, 3))
    else:
        rows = [row[::-1] for row in rows[: rng.randint(1, len(rows))]]
    return to_bytes(rows)


MUTATIONS = [flip_bits, cut, put_in, drop_quote, recode, mix_encodings, change_cells, change_shape]
STEPS = st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 2**32 - 1)), min_size=1, max_size=3)
MANY = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def mutate(data, steps):
    """Apply a list of (mutation, seed)."""
    for change, seed in steps:
        data = change(data, random.Random(seed))
    return data


@settings(max_examples=300, **MANY)
@given(STEPS, st.booleans())
def test_papers_are_read_whole_or_refused_in_a_line(tmp_path, steps, labelled):
    path, rows = tmp_path / "papers.csv", to_rows((SAMPLE / "train.csv").read_bytes())
    path.write_bytes(mutate(to_bytes(rows[:31]), steps))
    started = time.perf_counter()
    try:
        papers = common.read_papers(path, labelled)
    except InputError as error:
        text = str(error).removeprefix(str(path))
        assert text != str(error), "the line begins with the file"
        assert "\n" not in text and text.isprintable() and 10 < len(text) < 500, text
        return
    finally:
        assert time.perf_counter() - started < 10
    assert len(papers) and papers["uuid"].is_unique and papers["uuid"].str.strip().all()
    assert not labelled or set(papers["label"]) == {0, 1}
    known = papers[[name for name in ("uuid", *common.FIELDS, "label") if name in papers]]
    known.to_csv(path, index=False, lineterminator="\n")
    assert common.read_papers(path, labelled).equals(known), "what was read comes back from a plain file"


@settings(max_examples=40, **MANY)
@given(STEPS, st.sampled_from(["train", "test"]))
def test_a_submission_is_whole_or_the_earlier_one_stays(kit, tmp_path, steps, side):
    rows = to_rows((SAMPLE / "train.csv").read_bytes())[:41]
    pair = {"train": to_bytes(rows[:31]), "test": to_bytes([row[:4] for row in rows[:1] + rows[31:]])}
    for name, data in pair.items():
        (tmp_path / f"{name}.csv").write_bytes(mutate(data, steps) if name == side else data)
    before = contents(tmp_path)
    done = kit("baseline.py", "--train", "train.csv", "--test", "test.csv", "--folds", "2")
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        header, *rows = to_rows((tmp_path / "outputs/baseline/submit_task1.csv").read_bytes())
        assert header == ["uuid", "Keywords", "label"] and {row[2] for row in rows} <= {"0", "1"}
        assert [row[0] for row in rows] == common.read_papers(tmp_path / "test.csv")["uuid"].tolist()
    else:
        faults = [line for line in done.stderr.splitlines() if line.startswith("baseline.py: ")]
        assert done.returncode == 2 and len(faults) == 1 and not done.stdout, done.stderr
        assert contents(tmp_path) == before


# ---- damaged results of earlier runs ---------------------------------------------------------------------------------

DAMAGED = [b"", b"[]", b"[" * 5000, b"\xff\xfe", b'{"papers": 5}', None]  # None: half of the file


def check_refused(refused, path, *command, word=None, allowed=()):
    """A script that reads a damaged `path` says so in one line, and changes nothing."""
    whole = path.read_bytes()
    for data in DAMAGED:
        if data in allowed:
            continue
        path.write_bytes(whole[: len(whole) // 2] if data is None else data)
        refused(*command, words=[word or path.name])
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["baseline/metrics.json", "baseline/valid.csv", "baseline/test.csv"])
def test_blend_refuses_damaged_results(kit, refused, tmp_path, name):
    assert kit("baseline.py", "--fields", "title", "--folds", "2").returncode == 0
    (tmp_path / "submit_task1.csv").write_text("earlier")
    own = [b"[]", b'{"papers": 5}'] if name.endswith("json") else []  # a participant's own model has what it likes
    check_refused(refused, tmp_path / "outputs" / name, "blend.py", word="baseline", allowed=own)


@pytest.mark.slow
def test_fine_tunes_refuse_damaged_results(kit, refused, tmp_path, tiny_bert, tiny_llm):
    out, few = tmp_path / "outputs", ["--limit", "24", "--fields", "title"]
    train = ["--epochs", "1", "--lr", "0.01", "--max-length"]
    lora = ["lora_finetune.py", "--model", tiny_llm, *train, "200", *few]
    bert = ["bert_finetune.py", "--model", tiny_bert, *train, "48", *few]
    for command in (["make_llm_data.py", *few], lora, ["lora_predict.py", *few], bert):
        done = kit(*command)
        assert done.returncode == 0, done.stderr
    for name in ("best/kit.json", "best/adapter_config.json", "best/adapter_model.safetensors", "training.json"):
        check_refused(refused, out / "lora" / name, "lora_predict.py", *few, word="lora")
    check_refused(refused, out / "lora" / "metrics.json", "lora_predict.py", "--predict-only", *few)
    check_refused(refused, out / "bert" / "metrics.json", "bert_finetune.py", "--predict-only", *few)
    for name in ("kit.json", "config.json", "model.safetensors", "tokenizer.json"):
        check_refused(refused, out / "bert" / "best" / name, "bert_finetune.py", "--predict-only", *few, word="best")
    for name in ("paper_label.json", "paper_label_valid.json", "paper_label_source.json"):
        check_refused(refused, out / name, *lora, "--name", "new", word="paper_label")


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


def check_failed(done, script, folder, before):
    """Exit code 2, a line that names a file that the script writes, and every file as it was or whole and new."""
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    found = re.fullmatch(rf"{script}: (\S+): (File too large|No space left on device)", line)
    named = folder / found[1] if found else None  # an absolute path stays what it is
    assert named and (named in before or named.name == ".lock"), line
    after = contents(folder)
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
    before, rng = contents(tmp_path), random.Random(script)
    largest = max(len(data or b"") for path, data in before.items() if path not in earlier)
    for size in [0, *(rng.randrange(largest - 1) for _ in range(3))]:
        with file_limit(size):
            done = kit(script)
        check_failed(done, script, tmp_path, before)


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


def write_checkpoint(path, step):
    import torch

    from lib import training

    torch.manual_seed(step)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    training.save_state(path, model, optimizer, {"step": step})


def write_model(path, step):
    from transformers import BertConfig, BertModel

    with results.atomic_write(path) as part:
        sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(**sizes, intermediate_size=32 * step)).save_pretrained(part)


@pytest.mark.parametrize("write", [write_checkpoint, write_model])
@pytest.mark.parametrize("size", [0, 500, 50_000])
def test_the_earlier_checkpoint_survives_a_full_disk(tmp_path, write, size):
    path = tmp_path / "last.safetensors"
    write(path, 1)
    before = contents(tmp_path)
    with file_limit(size), pytest.raises(OSError, match="File too large") as error:
        write(path, 2)
    assert error.value.filename == str(path) and contents(tmp_path) == before


def test_a_lock_that_cannot_be_written_names_its_folder(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError) as error, results.locked(tmp_path / "a" / "b"):
        pass
    assert error.value.filename.startswith(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("where", "lines", "code", "said"),
    [
        (">/dev/full", 1, 2, "No space left on device"),
        (">/dev/full", 100_000, 2, "No space left on device"),
        ("| head -1 >/dev/null", 100_000, 2, "Broken pipe"),
        (">&-", 1, 0, ""),
    ],
)
def test_stdout_that_takes_nothing(where, lines, code, said):
    script = f"from lib import cli; cli.run_script(lambda: print('line\\n' * {lines}))"
    command = f'"{sys.executable}" -c "{script}" {where}; exit ${{PIPESTATUS[0]}}'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], cwd=KIT, env=environment, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr


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


def pickled_weights(folder, ran):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.weight": Payload(ran)}, folder / "pytorch_model.bin")


def code_in_the_directory(folder, ran):
    (folder / "evil.py").write_text(CODE.format(base="PretrainedConfig", path=str(ran)))
    names = ("AutoConfig", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
    edit_json(folder / "config.json", model_type="evil", auto_map=dict.fromkeys(names, "evil.Evil"))


def index_that_leads_out(folder, ran):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map={"a": "../x.safetensors"})


def link_that_leads_out(folder, ran):
    shutil.move(folder / "config.json", folder.parent / "x.json")
    (folder / "config.json").symlink_to(folder.parent / "x.json")


@pytest.mark.parametrize("script", ["bert_finetune.py", "lora_finetune.py"])
@pytest.mark.parametrize("spoil", [pickled_weights, code_in_the_directory, index_that_leads_out, link_that_leads_out])
def test_nothing_of_a_hostile_model_is_run_or_read(kit, refused, tmp_path, tiny_bert, tiny_llm, script, spoil):
    folder = shutil.copytree(tiny_bert if script == "bert_finetune.py" else tiny_llm, tmp_path / "model")
    spoil(folder, tmp_path / "ran")
    assert kit("make_llm_data.py", "--fields", "title").returncode == 0
    refused(script, "--model", "model", "--max-length", "48", "--fields", "title", words=["model"])


def test_code_beside_a_model_that_needs_none_is_not_run(tmp_path, tiny_bert):
    import bert_finetune

    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "evil.py").write_text(CODE.format(base="BertConfig", path=str(tmp_path / "ran")))
    classes = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.M"}
    edit_json(folder / "config.json", auto_map=classes)
    (folder / "pytorch_model.bin").write_bytes(b"x")  # beside safetensors it isn't read
    bert_finetune.load_tokenizer(str(folder))
    bert_finetune.load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_old_weights_without_code_are_read(tmp_path, tiny_bert):
    import torch
    from safetensors.torch import load_file

    import bert_finetune

    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = bert_finetune.load_model(str(folder)).bert.state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_nothing_of_a_hostile_adapter_is_run_or_read(kit, refused, tmp_path, tiny_llm):
    import torch

    train = ["--model", tiny_llm, "--epochs", "1", "--lr", "0.01", "--max-length", "200"]
    assert kit("make_llm_data.py", "--limit", "24", "--fields", "title").returncode == 0
    assert kit("lora_finetune.py", *train).returncode == 0
    adapter = shutil.copytree(tmp_path / "outputs" / "lora" / "best", tmp_path / "adapter")
    command = ["lora_predict.py", "--adapter", "adapter", "--name", "new", "--limit", "24"]
    torch.save({"a": Payload(tmp_path / "ran")}, adapter / "adapter_model.bin")  # beside safetensors it isn't read
    (adapter / "evil.py").write_text(CODE.format(base="PretrainedConfig", path=str(tmp_path / "ran")))
    edit_json(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    assert kit(*command).returncode == 0 and not (tmp_path / "ran").exists()
    shutil.move(adapter / "adapter_model.safetensors", tmp_path / "x.safetensors")
    refused(*command, words=["has no adapter_model.safetensors"])
    (adapter / "adapter_model.safetensors").symlink_to("../x.safetensors")
    refused(*command, words=["is a link out of the directory"])


def test_links_of_the_hubs_cache_are_allowed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    (blobs / "ab12").write_text("{}")
    (tmp_path / "models--a--b" / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ab12")
    (snapshot / "onnx" / "config.json").symlink_to("../../../blobs/ab12")
    (tmp_path / "elsewhere").symlink_to(snapshot)  # the directory itself may be a link
    hub.check_folder(snapshot)
    hub.check_folder(tmp_path / "elsewhere")
    (snapshot / "more.json").symlink_to("../../secret")
    with pytest.raises(InputError, match="more.json is a link"):
        hub.check_folder(snapshot)


def test_a_git_lfs_pointer_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="git lfs pull"):
        hub.check_folder(tmp_path)


# ---- a hub that fails ------------------------------------------------------------------------------------------------


class Answer(http.server.BaseHTTPRequestHandler):
    """A hub that has one fault for each model: kit/status500 is answered with status 500, kit/silent0 never."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind, status = re.search(r"(?:/kit/([a-z]+)(\d+)|$)", self.path).groups()
        if kind == "silent":
            return self.server.over.wait(60)
        self.send_response(int(status or 404))
        if kind in ("gated", "missing"):
            self.send_header("X-Error-Code", {"gated": "GatedRepo", "missing": "RepoNotFound"}[kind])
        self.end_headers()
        self.wfile.write(b"<html>not JSON</html>")

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def failing_hub():
    """The server's address, and the list of what it was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.asked, server.over, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.asked
    server.over.set()
    server.shutdown()


def ask(tmp_path, address, *names, **env):
    """hub.download of several models in another process: {name: (what was said, seconds)}."""
    script = """if True:
        import json, sys, time
        from lib import hub
        for name in sys.argv[1:]:
            started = time.time()
            try:
                hub.download("--model", name)
            except hub.InputError as error:
                print(json.dumps([name, [str(error), time.time() - started]]))"""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=KIT, env=environment, capture_output=True, text=True, timeout=90)
    assert "Traceback" not in done.stderr, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def test_what_the_hub_answers_becomes_one_line(tmp_path, failing_hub):
    words = {"missing404": "check the name", "gated403": "gated", "status429": "wait some minutes"}
    words |= {"status500": "status 500", "status200": "kit/status200"}
    said = ask(tmp_path, failing_hub[0], *(f"kit/{name}" for name in words))
    for name, word in words.items():
        line, seconds = said[f"kit/{name}"]
        assert line.startswith(f"--model kit/{name} can't be downloaded: ") and word in line and "\n" not in line, line
        assert "HF_ENDPOINT" in line and seconds < 20


@pytest.mark.parametrize(
    ("address", "env", "word"),
    [
        ("http://127.0.0.1:9", {}, "can't be reached"),
        ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
        ("http://no.such.host.invalid", {}, "can't be reached"),
        pytest.param("silent", {}, "no answer in 10 s", marks=pytest.mark.slow),
    ],
)
def test_a_hub_out_of_reach_is_one_line(tmp_path, failing_hub, address, env, word):
    name = "kit/silent0" if address == "silent" else "kit/any"
    line, seconds = ask(tmp_path, failing_hub[0] if address == "silent" else address, name, **env)[name]
    assert word in line and "HF_ENDPOINT" in line and "\n" not in line and seconds < 15
    assert sum(name in path for path in failing_hub[1]) <= 1, "it is asked once"
