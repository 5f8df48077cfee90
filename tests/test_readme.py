"""The READMEs: the example runs as it is written, links lead somewhere, files and flags that are named exist."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from conftest import KIT, SAMPLE, call

import pytest

READMES = ["README.md", "README.zh-CN.md"]
PAGES = [*KIT.glob("*.md"), *KIT.glob("docs/*.md"), *KIT.glob("data/*.md")]


def read(name):
    return (KIT / name).read_text(encoding="utf-8")


def commands(text):
    """The scripts that a README runs, with their flags: 'python blend.py --submit x' -> ('blend.py', ['--submit'])."""
    for script, rest in re.findall(r"python (\w+\.py)([^`\n#]*)", text):
        yield script, [word for word in shlex.split(rest) if word.startswith("--")]


def example(name):
    """The code of an own model."""
    return re.search(r"```python\n(.+?)```", read(name), re.DOTALL)[1]


def test_the_example_of_an_own_model_joins_the_blend(kit, tmp_path):
    (tmp_path / "mine.py").write_text(example("README.md"))
    shutil.copy(KIT / "common.py", tmp_path)
    shutil.copytree(KIT / "lib", tmp_path / "lib")
    shutil.copytree(SAMPLE, tmp_path / "data" / "sample")
    env = {name: value for name, value in os.environ.items() if name not in ("DATA_DIR", "OUT_DIR")}
    subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, check=True)
    assert kit("baseline.py", "--folds", "2").returncode == 0
    done = kit("blend.py")
    assert done.returncode == 0, done.stderr
    held_out = done.stdout.split("Held-out papers")[1].split("Test papers")[0]
    assert re.search(r"^baseline .* 120 held out", held_out, re.MULTILINE), done.stdout
    assert re.search(r"^mine .* 120 held out, own model$", held_out, re.MULTILINE), done.stdout


def test_the_example_is_the_same_in_both_languages():
    assert ast.dump(ast.parse(example("README.md"))) == ast.dump(ast.parse(example("README.zh-CN.md")))


def anchors(page):
    """What GitHub calls the headings of a page: '## When it fails' -> 'when-it-fails'."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\(([^)]+)", read(page)):
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("readme", READMES)
def test_the_file_tree_names_every_script_once(readme):
    tree = re.search(r"```\n(run\.sh .+?)```", read(readme), re.DOTALL)[1]
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    found = [path.name for path in [*KIT.glob("*.py"), *KIT.glob("*.sh")]]
    assert sorted(name for name in named if not name.endswith("/")) == sorted(found)


@pytest.mark.parametrize("readme", READMES)
def test_the_first_table_shows_the_run_that_it_names(readme):
    text, run = read(readme), json.loads(read("docs/run.json"))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    names = {"`baseline.py`": "baseline", "`bert_finetune.py`": "bert", "LoRA": "lora", "`bash run.sh`": "all"}
    for name, stage in names.items():
        row = [cell.strip("* |") for cell in next(row for row in rows if name in row[0])]
        assert row[1:3] == [f"{run['minutes'][stage]:.1f}", f"{run['test_accuracy'][stage]:.3f}"], name
        if stage == "baseline":
            assert row[3] == f"{run['no_author_accuracy']:.3f}"
            assert float(row[4][:5]) == run["no_author_test_accuracy"]
    for figure in (*run["board_estimate"], run["memory_gib"]):
        assert str(figure) in text


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: the flags that its --help lists} of the scripts at the top."""
    found = {}
    for path in KIT.glob("*.py"):
        if path.name != "common.py":
            done = call(tmp_path_factory.mktemp("help"), path.name, "--help")
            found[path.name] = set(re.findall(r"^ +(--[\w-]+)", done.stdout, re.MULTILINE))
    return found


@pytest.mark.parametrize("readme", READMES)
def test_scripts_and_flags_that_are_named_exist(flags, readme):
    text = read(readme)
    for script, named in commands(text.replace("python mine.py", "")):
        assert [flag for flag in named if flag not in flags[script]] == [], script
    in_prose = set(re.findall(r"`(--[a-z-]+)", text)) - {"--help"}
    assert in_prose - set().union(*flags.values()) == set()


def test_both_languages_give_the_same_commands():
    english, chinese = (sorted(commands(read(name)), key=str) for name in READMES)
    assert english == chinese
