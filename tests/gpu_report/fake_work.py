"""Work that tells, fails, dies or hangs; imported by name in processes of its own."""

import os
import signal
import sys
import time


def tell_two(tell, first, second):
    tell({"n": first})
    tell({"n": second})
    print("noise on stdout")


def fail_later(tell):
    tell({"n": 1})
    raise ValueError("out of\nmemory")


def die(tell):
    tell({"n": 1})
    sys.stderr.write("CUDA error: an illegal memory access\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(tell, file):
    """Start a process of its own, as compilers do, and wait for ever."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(file, "w") as stream:
        stream.write(str(child.pid))
    tell({"n": 1})
    time.sleep(600)
