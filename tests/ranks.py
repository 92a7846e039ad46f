"""Start `train_imagenet.main` as the ranks of a run, again and again, by a program that has imported it once.

Real processes with torchrun's environment, without torchrun: `test_preemption.py` speaks to it over a pipe.
"""

import json
import os
import signal
import sys
import traceback

import imagenet_training.run.run_folder  # noqa: F401  so that no fork has to import it
import train_imagenet


def become(rank: int, job: dict) -> int:
    """Run the script as one rank in the job's folder; return its exit status.

    Its output goes to ``out.txt`` there or, if nobody reads it, into a pipe.
    """
    os.chdir(job["folder"])
    if "nohup" in job["output"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if "no reader" in job["output"]:
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    world_size = job["world_size"]
    if world_size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
            os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    sys.argv = ["train_imagenet.py", *job["arguments"]]
    try:
        train_imagenet.main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
    return 0


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["world_size"]):
            pid = os.fork()
            if pid == 0:
                os._exit(become(rank, job))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
