# shellcheck shell=bash disable=SC2154
# What run.sh is made of: stages of which one may fail, commands that a signal stops at once, last lines that say what
# failed. run.sh sets $kit, $outputs, $stages (those asked for) and $left (those of them that are not done yet).

# Where stderr is closed or full, the work goes on without it.
say() { printf '\n== %s\n' "$*" >&2 || exec 2>/dev/null; }

die() {
    printf 'run.sh: %s\n' "$*" >&2
    exit 2
}

# contains "bert blend" blend
contains() { case " $1 " in *" $2 "*) ;; *) return 1 ;; esac; }

failed="" # those that failed or were left out
now=setup # the one that runs

# stage NAME NEEDED COMMAND ...: run the command if the stage is asked for and the stage it needs has not failed.
stage() {
    local name=$1 needed=$2 code=0
    shift 2
    contains "$stages" "$name" || return 0
    now=$name
    if contains "$failed" "$needed"; then
        say "$name is left out: it needs $needed"
        code=1
    else
        "$@" || code=$?
    fi
    if [ "$code" = 0 ]; then
        left=" $left "
        left=${left/ $name / }
        return
    fi
    failed="$failed $name"
    [ "$code" != 137 ] || say "$name was killed, most likely because memory ran out"
    { mkdir -p "$outputs" && printf '%s\n' "$name" >>"$outputs/failed.txt"; } || true # for the report
}

# Run a command in a process group of its own, so that a signal to this script stops at once all that it has started.
child() {
    set -m
    "$@" </dev/null &
    set +m
    wait $!
}

stop() {
    trap - HUP INT TERM
    for job in $(jobs -p); do
        kill -TERM -- "-$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    done
    # shellcheck disable=SC2034
    case $now in bert | lora) RESUME=1 ;; esac
    printf '\nrun.sh: stopped during %s; to go on: %s\n' "$now" "$(again)" >&2
    exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

# The command for the stages that are left, with the settings of this run.
again() {
    for name in DATA_DIR OUT_DIR SEED BERT_MODEL LLM_MODEL LLM_4BIT RESUME PYTHON; do
        [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
    done
    # shellcheck disable=SC2086
    printf 'bash %q' "$0" && printf ' %s' $left
}

# The last lines: what there is, what is missing, the exit code.
finish() {
    if contains "$stages" blend && ! contains "$failed" blend; then
        echo "submission: $PWD/submit_task1.csv" || true
        left="$left blend" # again, when what failed is done
    fi
    if contains "$stages" blend || contains "$stages" report; then
        echo "report: $outputs/report.html" || true
    fi
    [ "$stages" != "setup setup" ] || [ -n "$failed" ] || say "$kit/.venv is ready"
    [ -n "$failed" ] || exit 0
    say "FAILED:$failed. What doesn't need it is done. When the cause is fixed:"
    printf '%s\n' "$(again)" >&2
    exit 1
}
