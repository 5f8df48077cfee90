"""Run a script on every GPU: python lib/launch.py bert_finetune.py --epochs 3

With more than one GPU this is `accelerate launch`, without the launcher's tracebacks: the script's processes have said themselves what
went wrong. The exit code is that of the process that failed first. A signal stops all of them.
"""

import os
import signal
import sys

import torch


def launch(gpus, command):
    """Start `command` (a script and its flags) in one process per GPU. Returns the exit code."""
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of torch's launcher, read when it is imported
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--multi_gpu", "--num_processes", str(gpus), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]  # port 0: a free one
    try:
        launch_command(launch_command_parser().parse_args([*flags, *command]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as a shell counts signals
    return 0


def main():
    gpus = torch.cuda.device_count()
    if gpus < 2:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    print(f"on {gpus} GPUs", file=sys.stderr, flush=True)
    sys.exit(launch(gpus, sys.argv[1:]))


if __name__ == "__main__":
    main()
