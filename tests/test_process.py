"""A process is known by its id and its start, and one that has ended does not live, whoever has its id."""

import os
import subprocess
import sys

import psutil

from distlm.process import living


def test_a_process_lives_until_it_ends_and_not_under_another_start() -> None:
    started = psutil.Process().create_time()
    assert living(os.getpid(), started) == psutil.Process()
    assert living(os.getpid(), started - 60) is None       # its id was given again
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        began = psutil.Process(child.pid).create_time()
        assert child.stdout and child.stdout.read() == b""
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert living(child.pid, began) is None            # nobody has asked for its exit code yet
    assert living(child.pid, began) is None
