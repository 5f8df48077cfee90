"""Run a script on every GPU: python lib/launch.py bert_finetune.py --epochs 3

With more than one GPU this is `accelerate launch`, minus the launcher's log and traceback: the processes have said
themselves what went wrong. The exit code is that of the process that failed first. A signal stops all of them.
"""

import logging
import os
import sys

import torch


def launch(processes, command):
    """Start `command` (a list: the script, its flags) in so many processes. Returns an exit code, as a shell counts."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)
    flags = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--gpu_ids", "all", "--main_process_port", "0"]  # 0: a port that is free
    try:
        launch_command(launch_command_parser().parse_args([*flags, *command]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # below 0: the signal that killed it
    return 0


def main():
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # not those that torch can't use
    command = sys.argv[1:]
    if gpus < 2:
        os.execv(sys.executable, [sys.executable, *command])
    print(f"on {gpus} GPUs", file=sys.stderr, flush=True)
    sys.exit(launch(gpus, command))


if __name__ == "__main__":
    main()
