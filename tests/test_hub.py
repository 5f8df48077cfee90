"""Models that nobody vouches for, and a hub that fails: no code is run, and one line says what is wrong."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time

from conftest import KIT, edit_json
from lib import hub
from lib.cli import InputError

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

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


@pytest.mark.parametrize("script", ["bert_finetune.py", "lora_finetune.py"])
@pytest.mark.parametrize("spoil", [pickled_weights, code_in_the_directory])
def test_nothing_of_a_hostile_model_is_run(kit, refused, tmp_path, tiny_bert, tiny_llm, script, spoil):
    folder = shutil.copytree(tiny_bert if script == "bert_finetune.py" else tiny_llm, tmp_path / "model")
    spoil(folder, tmp_path / "ran")
    assert kit("make_llm_data.py", "--fields", "title").returncode == 0
    refused(script, "--model", "model", "--max-length", "48", words=["program code"])


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


@pytest.mark.slow
def test_nothing_of_a_hostile_adapter_is_run(kit, refused, tmp_path, tiny_llm):
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
    (adapter / "adapter_model.safetensors").unlink()
    refused(*command, words=["has no adapter_model.safetensors"])


def test_a_directory_of_links_loads(tmp_path, tiny_bert):
    """As the hub's cache, or a directory of links into it."""
    (tmp_path / "model").mkdir()
    for path in tiny_bert.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    assert hub.local_folder("--model", str(tmp_path / "model")) == str(tmp_path / "model")


def test_a_git_lfs_pointer_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="git lfs pull"):
        hub.local_folder("--model", str(tmp_path))


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model-1.safetensors", "consolidated.safetensors", "pytorch_model.bin"], ["model-1.safetensors"]),  # Mistral
        (["pytorch_model.bin", "consolidated.00.pth", "onnx/model.bin"], ["pytorch_model.bin"]),
    ],
)
def test_weights_are_downloaded_once(tmp_path, monkeypatch, files, weights):
    def snapshot_download(name, allow_patterns, ignore_patterns, etag_timeout):
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).touch()
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.local_folder("--model", "kit/any") == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == weights


# ---- a hub that fails ------------------------------------------------------------------------------------------------


class Answer(http.server.BaseHTTPRequestHandler):
    """A hub that has one fault for each model: kit/status500 is answered with status 500, kit/silent0 never."""

    def do_GET(self):
        kind, status = re.search(r"(?:/kit/([a-z]+)(\d+)|$)", self.path).groups()
        if kind == "silent":
            return self.server.over.wait(60)
        self.send_response(int(status or 404))
        if kind in ("gated", "missing"):
            self.send_header("X-Error-Code", {"gated": "GatedRepo", "missing": "RepoNotFound"}[kind])
        if kind == "expired":
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.end_headers()
        self.wfile.write(b"<html>not JSON</html>")

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def failing_hub():
    """The server's address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.over, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.over.set()
    server.shutdown()


@pytest.mark.parametrize(
    ("name", "env", "words"),
    [
        ("kit/missing404", {}, ["404", "specified the correct `repo_id`"]),
        ("kit/gated403", {}, ["403", "Cannot access gated repo"]),
        ("kit/expired401", {"HF_TOKEN": "hf_expired"}, ["401", "Invalid credentials"]),
        ("kit/status429", {}, ["429"]),
        ("kit/any", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["refused", "try again"]),
        ("kit/any", {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE=0"]),
        ("kit/any", {"ALL_PROXY": "socks5://127.0.0.1:9"}, ["SOCKS", "socksio"]),
        pytest.param("kit/silent0", {}, ["timed out", "try again"], marks=pytest.mark.slow),
    ],
)
def test_a_hub_that_fails_is_one_line(tmp_path, failing_hub, name, env, words):
    """In another process, for huggingface_hub reads the environment when it is imported."""
    script = "import sys; from lib import cli, hub; cli.run_script(lambda: hub.download('--model', sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": failing_hub, "HF_HOME": str(tmp_path), **env}
    started = time.perf_counter()
    command = [sys.executable, "-c", script, name]
    done = subprocess.run(command, cwd=KIT, env=environment, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"--model {name} can't be downloaded (" in line and "HF_ENDPOINT" in line
    assert [word for word in words if word not in line] == [], line
    assert time.perf_counter() - started < 25
