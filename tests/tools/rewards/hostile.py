"""Programs that nobody should run: each is to be contained and to fail.

Most set ``won`` if their attack succeeds, and only then give right answers (``WON`` is appended to these). ``{...}`` are filled in by ``test_sandbox.py``: ``canary`` (a file), ``folder`` (its folder), ``pid`` (of
the test's process), ``port`` (of a server), ``repository``, ``python`` (the interpreter).
"""

# ruff: noqa: E501 (programs in one line)

from dataclasses import dataclass

TESTS = "assert solve(2) == 4\nassert solve(3) == 9\n"
WON = "\n\ndef solve(x):\n    return x * x if won else None\n"
RIGHT = "\n\ndef solve(x):\n    return x * x\n"


@dataclass(frozen=True)
class Hostile:
    """A program, and the tests that it must not pass."""

    program: str
    tests: str = TESTS
    helper: str = ""
    function: str = ""

    @property
    def whole(self) -> str:
        return self.program + WON if "won = " in self.program else self.program


def _endless() -> dict[str, str | Hostile]:
    return {
        "loop": f"while True:\n    pass{RIGHT}",
        "loop_that_catches_everything": f"while True:\n    try:\n        raise KeyboardInterrupt\n"
        f"    except BaseException:\n        pass{RIGHT}",
        "loop_in_the_function": "def solve(x):\n    while True:\n        pass",
        "loop_of_the_second_call": "calls = []\ndef solve(x):\n    calls.append(x)\n    while len(calls) > 1:\n"
        "        pass\n    return x * x",
        "sleep": f"import time\ntime.sleep(1e6){RIGHT}",
        "sleep_in_the_function": "import time\ndef solve(x):\n    time.sleep(1e6)\n    return x * x",
        "count_without_end": f"import itertools\nsum(itertools.count()){RIGHT}",
        "power_tower": f"x = 9 ** 9 ** 9{RIGHT}",
        "huge_factorial": f"import math\nmath.factorial(10 ** 9){RIGHT}",
        "catastrophic_regex": f"import re\nre.match(r'(a+)+$', 'a' * 64 + 'b'){RIGHT}",
        "deadlock": f"import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire(){RIGHT}",
        "endless_recursion": "def solve(x):\n    return solve(x)",
        "recursion_without_limit": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef solve(x):\n    return solve(x)",
        "waits_for_input": f"import sys\nsys.stdin.read()\ninput(){RIGHT}",
        "waits_for_a_signal": f"import signal\nsignal.pause(){RIGHT}",
        "stops_itself": f"import os, signal\nos.kill(os.getpid(), signal.SIGSTOP){RIGHT}",
        "ignores_all_signals": "import signal\nfor each in range(1, 65):\n    try:\n"
        "        signal.signal(each, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\n"
        f"while True:\n    pass{RIGHT}",
        "ignores_the_processor_limit": "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\n"
        f"while True:\n    pass{RIGHT}",
        "alarm_without_end": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\n"
        f"signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nwhile True:\n    signal.pause(){RIGHT}",
        "busy_threads": "import threading\ndef spin():\n    while True:\n        pass\nfor _ in range(8):\n"
        f"    threading.Thread(target=spin).start()\nspin(){RIGHT}",
        "endless_destructor": "class Trap:\n    def __del__(self):\n        while True:\n            pass\n"
        f"trap = Trap()\ndel trap{RIGHT}",
        "endless_compilation": f"eval('+'.join(['1'] * 10 ** 7)){RIGHT}",
    }


def _processes() -> dict[str, str | Hostile]:
    return {
        "fork_bomb": f"import os\nwhile True:\n    os.fork(){RIGHT}",
        "fork_bomb_that_catches": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n"
        f"        pass{RIGHT}",
        "fork_bomb_by_interpreters": "import subprocess, sys\nwhile True:\n"
        f"    subprocess.Popen([sys.executable, '-c', 'while 1: pass']){RIGHT}",
        "fork_bomb_of_sessions": "import os, time\nfor _ in range(1000):\n    if os.fork() == 0:\n        os.setsid()\n"
        f"        if os.fork() == 0:\n            time.sleep(1e6)\n        os._exit(0){RIGHT}",
        "more_processes_than_allowed": "import os, time\nstarted = 0\nfor _ in range(64):\n    if os.fork() == 0:\n"
        "        time.sleep(1e6)\n    started += 1\nwon = started == 64",
        "more_threads_than_allowed": "import threading, time\nthreading.stack_size(32768)\nfor _ in range(200):\n"
        f"    threading.Thread(target=time.sleep, args=(1e6,)).start(){RIGHT}",
        "daemon_that_outlives": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(1e6)\n    os._exit(0)\nwon = False",
        "daemon_that_answers_for_it": "import os\nif os.fork() == 0:\n    os.setsid()\nelse:\n    os._exit(0)\n"
        "def solve(x):\n    return None",
        "process_pool": "import multiprocessing\nwith multiprocessing.Pool(64) as pool:\n"
        "    won = len(set(pool.map(abs, range(100)))) == 100",
        "execs_something_else": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(4)'])",
        "execs_a_shell": "import subprocess\nwon = subprocess.run(['/bin/sh', '-c', 'true']).returncode == 0",
        "shell_by_system": "import os\nwon = os.system('true') == 0",
        "raises_its_limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10 ** 4, 10 ** 4))\nwon = True",
        "raises_its_memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nwon = True",
        "becomes_root": "import os\nos.setuid(0)\nwon = True",
        "becomes_root_by_effect": "import os\nos.setresuid(-1, 0, -1)\nwon = True",
        "becomes_more_urgent": "import os\nos.setpriority(os.PRIO_PROCESS, 0, -20)\nwon = True",
    }


def _memory() -> dict[str, str | Hostile]:
    return {
        "list_that_grows": f"x = [0]\nwhile True:\n    x += x{RIGHT}",
        "array_of_8_gib": f"x = bytearray(1 << 33){RIGHT}",
        "mapping_of_8_gib": f"import mmap\nx = mmap.mmap(-1, 1 << 33){RIGHT}",
        "text_that_grows": f"x = 'a'\nwhile True:\n    x += x{RIGHT}",
        "processes_that_fill_memory": "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n"
        f"        x = b'a' * (100 << 20)\n        time.sleep(1e6)\ntime.sleep(1e6){RIGHT}",
        "fills_tmp": "import os\nwritten = 0\ntry:\n    for number in range(200):\n"
        "        with open(f'/tmp/{number}', 'wb') as file:\n            written += file.write(bytes(1 << 20))\n"
        "except OSError:\n    pass\nwon = written > 100 << 20",
        "fills_anonymous_files": "import os\nfiles = []\ntry:\n    for number in range(50):\n"
        "        files.append(os.memfd_create('x'))\n        os.ftruncate(files[-1], 1 << 30)\n"
        "except OSError:\n    pass\nwon = len(files) == 50 and os.fstat(files[-1]).st_size == 1 << 30",
        "shared_by_processes": "import mmap, os, time\nfor _ in range(12):\n    if os.fork() == 0:\n"
        "        memory = mmap.mmap(-1, 100 << 20)\n        for page in range(0, 100 << 20, 4096):\n"
        f"            memory[page] = 1\n        time.sleep(1e6)\ntime.sleep(1e6){RIGHT}",
        "fills_shared_memory": "written = 0\ntry:\n    for number in range(200):\n"
        "        with open(f'/dev/shm/{number}', 'wb') as file:\n            written += file.write(bytes(1 << 20))\n"
        "except OSError:\n    pass\nwon = written > 32 << 20",
        "files_without_content": "import os\nnumber = 0\nwhile True:\n    os.mkdir(f'/tmp/{number}')\n    number += 1\n"
        f"{RIGHT}",
        "file_beyond_the_limit": "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with open('/tmp/x', 'wb') as file:\n    file.write(bytes(64 << 20))\nwon = True",
        "sparse_file": "import os\nos.truncate(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 1 << 40)\nwon = True",
        "files_without_end": "import os\nwhile True:\n    os.open('/tmp', os.O_RDONLY)\n",
        "result_too_large": "def solve(x):\n    return 'a' * (1 << 26)",
        "result_too_deep": "def solve(x):\n    nested = []\n    for _ in range(10 ** 5):\n        nested = [nested]\n"
        "    return nested",
        "result_that_holds_itself": "def solve(x):\n    nested = []\n    nested.append(nested)\n    return nested",
        "result_of_exponential_size": "def solve(x):\n    nested = [1]\n    for _ in range(60):\n"
        "        nested = [nested, nested]\n    return nested",
    }


def _output() -> dict[str, str | Hostile]:
    return {
        "prints_without_end": f"while True:\n    print('a' * 1000){RIGHT}",
        "errors_without_end": f"import sys\nwhile True:\n    sys.stderr.write('a' * 1000){RIGHT}",
        "writes_into_every_descriptor": "import os\nfor each in range(64):\n    try:\n"
        "        os.write(each, b'a' * 4096)\n    except OSError:\n        pass\n" + RIGHT,
        "answers_without_end": "import os\nwhile True:\n    for each in range(3, 64):\n        try:\n"
        "            os.write(each, b'{\"value\": 4}')\n        except OSError:\n            pass\n" + RIGHT,
        "answer_that_is_no_text": "import os\ndef solve(x):\n    for each in range(3, 64):\n        try:\n"
        "            os.write(each, b'\\xff\\xfe\\n')\n        except OSError:\n            pass\n    return x * x",
        "answer_of_a_deep_tree": "import os\ndef solve(x):\n    for each in range(3, 64):\n        try:\n"
        "            os.write(each, b'{\"value\": ' + b'{\"list\": [' * 5000 + b'\\n')\n        except OSError:\n"
        "            pass\n    return x * x",
        "answer_of_an_unknown_kind": "import os\ndef solve(x):\n    for each in range(3, 64):\n        try:\n"
        '            os.write(each, b\'{"value": {"pickle": 1}}\\n\')\n        except OSError:\n            pass\n'
        "    return x * x",
        "answers_ahead": "import os\nfor each in range(3, 64):\n    try:\n"
        "        os.write(each, b'{\"value\": {}}\\n' * 9)\n    except OSError:\n        pass\n" + RIGHT,
    }


def _network() -> dict[str, str | Hostile]:
    connect = "import socket\nsocket.create_connection(('{host}', {port}), timeout=1)\nwon = True"
    return {
        "connects_to_this_machine": connect.replace("{host}", "127.0.0.1"),
        "connects_by_name": connect.replace("{host}", "localhost"),
        "connects_outside": "import socket\nsocket.create_connection(('8.8.8.8', 53), timeout=1)\nwon = True",
        "asks_for_a_name": "import socket\nwon = bool(socket.getaddrinfo('pypi.org', 443))",
        "fetches_a_page": "import urllib.request\nwon = bool(urllib.request.urlopen('http://127.0.0.1:{port}').read())",
        "sends_a_datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'a', "
        "('127.0.0.1', {port}))\nwon = False",
        "connects_by_ipv6": "import socket\nsocket.create_connection(('::1', {port}), timeout=1)\nwon = True",
        "raw_socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)\nwon = True",
        "packet_socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nwon = True",
        "socket_without_a_file": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0hpd-{port}')\nwon = True",
        "socket_of_a_file": "import socket\nsocket.socket(socket.AF_UNIX).connect('{folder}/socket')\nwon = True",
        "other_interfaces": "import socket\nwon = any(name != 'lo' for _, name in socket.if_nameindex())",
    }


def _reading() -> dict[str, str | Hostile]:
    return {
        "reads_a_file_of_home": "won = 'canary' in open('{canary}').read()",
        "lists_a_folder": "import os\nwon = bool(os.listdir('{folder}'))",
        "lists_home": "import os\nwon = bool(os.listdir(os.path.expanduser('~')))",
        "finds_a_file_anywhere": "import os\nwon = any('canary.txt' in files for _, _, files in os.walk('/'))",
        "reads_the_repository": "import os\nwon = os.path.exists('{repository}/pyproject.toml')",
        "reads_the_environment": "import os\nwon = 'HPD_TEST_SECRET' in os.environ",
        "environment_of_its_process": "won = b'HPD_TEST_SECRET' in open('/proc/self/environ', 'rb').read()",
        "environment_of_its_parent": "import os\n"
        "won = b'HPD_TEST_SECRET' in open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "environment_in_memory": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        "won = libc.getenv(b'HPD_TEST_SECRET') is not None",
        "environment_of_the_test": "won = b'HPD' in open('/proc/{pid}/environ', 'rb').read()",
        "other_processes": "import os\nwon = len([name for name in os.listdir('/proc') if name.isdigit()]) > 0",
        "root_of_another_process": "import os\nwon = bool(os.listdir('/proc/1/root/'))",
        "users": "won = 'root' in open('/etc/passwd').read()",
        "passwords": "won = 'root' in open('/etc/shadow').read()",
        "hosts": "won = 'localhost' in open('/etc/hosts').read()",
        "memory_of_the_machine": "won = bool(open('/dev/mem', 'rb').read(1))",
        "disk": "import os\nwon = any(name.startswith(('sd', 'vd', 'nvme')) for name in os.listdir('/dev'))",
        "graphics_card": "import os\nwon = os.path.exists('/dev/nvidia0') or os.path.exists('/dev/nvidiactl')",
        "shared_memory": "import os\nwon = bool(os.listdir('/dev/shm'))",
        "note_of_the_last_one": "import os\nnotes = '/tmp/note', '/dev/shm/note'\nwon = any(map(os.path.exists, notes))\n"
        "for note in notes:\n    open(note, 'w').close()",
        "note_of_the_last_one_again": "import os\nnotes = '/tmp/note', '/dev/shm/note'\n"
        "won = any(map(os.path.exists, notes))",
        "shared_memory_segments": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "won = any(libc.shmat(number, None, 0) != -1 for number in range(100))",
        "kernel_settings": "import os\nwon = bool(os.listdir('/sys'))",
        "kernel_log": "import ctypes\nbuffer = ctypes.create_string_buffer(4096)\n"
        "won = ctypes.CDLL(None).klogctl(3, buffer, 4096) > 0",
        "terminal": "won = bool(open('/dev/tty'))",
        "other_packages": "import site, sys\nsys.path += ['{repository}', *site.getsitepackages()]\nimport torch\nwon = True",
        "sockets_of_services": "import os\nwon = os.path.exists('/run') or os.path.exists('/var/run/docker.sock')",
        "folder_by_its_descriptor": "import os\nwon = any('canary.txt' in os.listdir(each) for each in range(64)"
        " if os.path.isdir(f'/proc/self/fd/{each}'))",
        "parents_of_the_root": "import os\nos.chdir('/')\nfor _ in range(20):\n    os.chdir('..')\n"
        "won = os.path.exists('.' + '{canary}')",
        "escapes_by_chroot": "import os\nos.mkdir('/tmp/x')\nfolder = os.open('/', os.O_RDONLY)\nos.chroot('/tmp/x')\n"
        "os.fchdir(folder)\nfor _ in range(20):\n    os.chdir('..')\nwon = True",
    }


def _writing() -> dict[str, str | Hostile]:
    tampered = "import os\nwith open(os.__file__, 'a') as file:\n    file.write('# hostile')\nwon = True"
    return {
        "deletes_a_file": "import os\nos.remove('{canary}')\nwon = True",
        "deletes_everything": "import os, shutil\nshutil.rmtree('/', ignore_errors=True)\n"
        "won = not os.path.exists('/usr/lib')",
        "overwrites_a_file": "open('{canary}', 'w').write('hostile')\nwon = True",
        "makes_the_folder_first": "import os\nos.makedirs('{folder}', exist_ok=True)\n"
        "open('{canary}', 'w').write('hostile')\nwon = False",
        "writes_through_a_link": "import os\nos.symlink('{canary}', '/tmp/link')\nopen('/tmp/link', 'a').write('x')\n"
        "won = True",
        "writes_through_a_folders_link": "import os\nos.symlink('{folder}', '/tmp/link')\n"
        "open('/tmp/link/canary.txt', 'a').write('x')\nwon = True",
        "reads_through_a_link": "import os\nos.symlink('{canary}', '/tmp/link')\nwon = bool(open('/tmp/link').read())",
        "links_a_file": "import os\nos.link('{canary}', '/tmp/link')\nwon = True",
        "links_through_its_process": "import os\nos.symlink('/proc/1/root{canary}', '/tmp/link')\n"
        "won = bool(open('/tmp/link').read())",
        "replaces_a_file": "import os\nopen('/tmp/x', 'w').close()\nos.rename('/tmp/x', '{canary}')\nwon = True",
        "opens_a_file_to_others": "import os\nos.chmod('{canary}', 0o777)\nwon = True",
        "writes_beside_python": "open('{python}.x', 'w').close()\nwon = True",
        "empties_python": "open('{python}', 'w').close()\nwon = True",
        "changes_the_library": tampered,
        "changes_the_packages": tampered.replace("import os", "import numpy as os"),
        "writes_at_the_root": "open('/x', 'w').close()\nwon = True",
        "module_for_its_tests": Hostile(
            "open('/tmp/statistics.py', 'w').write('mean = lambda values: 4')\nopen('statistics.py', 'w').write('mean=1')"
            "\n\ndef solve(x):\n    return 4",
            "import statistics\nassert solve(3) == statistics.mean([9])",
        ),
        "mounts": "import ctypes\nwon = ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
        "mounts_writable": "import ctypes\nwon = ctypes.CDLL(None).mount(None, b'/', None, 32, None) == 0",
        "unmounts": "import ctypes\nwon = ctypes.CDLL(None).umount2(b'/usr/lib', 2) == 0",
        "makes_a_device": "import os, stat\nos.mknod('/tmp/mem', stat.S_IFCHR | 0o666, os.makedev(1, 1))\n"
        "won = bool(open('/tmp/mem', 'rb').read(1))",
        "renames_the_machine": "import socket\nsocket.sethostname('hostile')\nwon = True",
        "sets_the_clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nwon = True",
        "restarts_the_machine": "import ctypes\nwon = ctypes.CDLL(None).reboot(0x1234567) == 0",
        "loads_a_module": "import ctypes\nwon = ctypes.CDLL(None).syscall(175, b'', 0, b'') == 0",
    }


_CALLS = """
import ctypes, mmap, os, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
column = ['x86_64', 'aarch64'].index(platform.machine())
some = ctypes.create_string_buffer(4096)

def call(numbers, *args):
    number = numbers[column] if isinstance(numbers, tuple) else numbers
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)) != -1

def opened(make, *args):
    try:
        make(*args)
    except (OSError, ValueError):
        return False
    return True

"""


def _kernel() -> dict[str, str | Hostile]:
    """Each tries several ways, and has won if one is not refused."""

    def tried(*ways: str) -> str:
        return f"{_CALLS}won = any([{', '.join(ways)}])"

    families = "[opened(socket.socket, family, kind) for family in range(2, 46) for kind in (1, 2, 3, 5)]"
    return {
        "keyrings": tried(
            "call((250, 219), 0, -3, 1)",
            "call((250, 219), 1, 0)",
            "call((250, 219), 7, -3)",
            "call((250, 219), 11, -4, some, 4096)",
            "call((248, 217), b'user', b'note', b'x', 1, -3)",
            "call((248, 217), b'user', b'note', b'x', 1, -4)",
            "call((249, 218), b'user', b'note', None, -3)",
        ),
        "segments_and_queues": tried(
            "call((29, 194), 0, 1 << 20, 0o1666)",
            "call((68, 186), 0, 0o1666)",
            "call((64, 190), 0, 1, 0o1666)",
            "call((240, 180), b'queue', 0o102, 0o666, 0)",
        ),
        "memory_of_no_process": tried(
            "call((319, 279), b'x', 0)", "call(447, 0)", "call((278, 75), 1, some, 1, 0)", "call((323, 282), 0)"
        ),
        "rings": tried("call(425, 8, some)", "call(426, 0, 0, 0, 0, 0)", "call(427, 0, 0, 0, 0)"),
        "namespaces": tried(
            *(f"call((272, 97), {flag})" for flag in (0x10000000, 0x20000000, 0x40000000, 0x20000, 0x8000000)),
            "call((308, 268), 0, 0)",
            "call((56, 220), 0x10000000 | 17, 0, 0, 0, 0)",
            "call((56, 220), 0x20000000 | 17, 0, 0, 0, 0)",
            "call(435, some, 88)",
        ),
        "other_processes_memory": tried(
            "call((101, 117), 16, 1, 0, 0)",
            "call((310, 270), os.getpid(), some, 1, some, 1, 0)",
            "call(438, 0, 0, 0)",
            "call((312, 272), os.getpid(), os.getpid(), 0, 0, 0)",
        ),
        "programs_in_the_kernel": tried(
            "call((321, 280), 0, some, 72)", "call((298, 241), some, 0, -1, -1, 0)", "call((300, 262), 0, 0)"
        ),
        "kernel_log_by_its_size": tried("call((103, 116), 10, 0, 0)", "call((103, 116), 3, some, 4096)"),
        "handles_of_files": tried("call((303, 264), -100, b'/tmp', some, some, 0)", "call((304, 265), -100, some, 0)"),
        "every_family_of_sockets": tried(f"*{families}"),
        "family_in_the_lower_half": tried(
            "call((41, 198), (1 << 32) + 2, 1, 0)", "call((41, 198), (1 << 32) + 40, 1, 0)"
        ),
        "calls_of_another_abi": tried(
            *(f"column == 0 and call(0x40000000 + {number}{args})" for number, args in ((250, ", 0, -3, 1"), (39, ""))),
            "column == 0 and call(0x40000000 + 41, 2, 1, 0)",
        ),
        "calls_of_another_processor": f"{_CALLS}won = False\nif column == 0:\n    code = mmap.mmap(-1, 4096, prot=7)\n"
        "    code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "    won = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0",
        "calls_of_later_kernels": tried("*[call(number, 0, 0, 0) for number in range(451, 480)]"),
        "types_into_the_terminal": f"{_CALLS}import fcntl\n"
        "won = any(opened(fcntl.ioctl, each, 0x5412, b'x') for each in range(3))",
        "hidden_by_threads": f"{_CALLS}import threading\nfound = []\n"
        "thread = threading.Thread(target=lambda: found.append(call((250, 219), 0, -3, 1)))\n"
        "thread.start()\nthread.join()\nwon = any(found)",
        "hidden_by_another_program": f"{_CALLS}import subprocess, sys\n"
        "code = 'import ctypes, sys; sys.exit(ctypes.CDLL(None).syscall(%d, 0, -3, 1) != -1)' % (250, 219)[column]\n"
        "won = subprocess.run([sys.executable, '-c', code]).returncode == 1",
    }


def _signals() -> dict[str, str | Hostile]:
    libc = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    return {
        "kills_its_parent": f"import os\nos.kill(os.getppid(), 9){RIGHT.replace('x * x', 'None')}",
        "kills_the_test": "import os\nos.kill({pid}, 9)\nwon = True",
        "kills_everything": f"import os\nos.kill(-1, 9){RIGHT.replace('x * x', 'None')}",
        "kills_its_group": f"import os\nos.killpg(0, 9){RIGHT}",
        "kills_every_number": "import os\nfor each in range(1, 70000):\n    try:\n        if each != os.getpid():\n"
        "            os.kill(each, 9)\n    except OSError:\n        pass\nwon = False",
        "stops_its_parent": f"import os, signal\nos.kill(os.getppid(), signal.SIGSTOP){RIGHT.replace('x * x', 'None')}",
        "kills_itself": f"import os\nos.kill(os.getpid(), 9){RIGHT}",
        "crashes": f"import ctypes\nctypes.string_at(0){RIGHT}",
        "aborts": f"import os\nos.abort(){RIGHT}",
        "opens_the_test_as_descriptor": "import os\nos.pidfd_open({pid})\nwon = True",
        "traces_the_test": f"{libc}won = libc.ptrace(16, {{pid}}, 0, 0) == 0",
        "traces_its_parent": f"{libc}libc.ptrace(16, os.getppid(), 0, 0)\nwon = False",
        "asks_to_be_traced": f"{libc}libc.ptrace(0, 0, 0, 0)\nos.kill(os.getpid(), 5){RIGHT}",
        "reads_the_tests_memory": f"{libc}class Part(ctypes.Structure):\n"
        "    _fields_ = [('start', ctypes.c_void_p), ('length', ctypes.c_size_t)]\n"
        "mine = ctypes.create_string_buffer(8)\n"
        "to, of = Part(ctypes.addressof(mine), 8), Part(id(None), 8)\n"
        "won = libc.process_vm_readv({pid}, ctypes.byref(to), 1, ctypes.byref(of), 1, 0) > 0",
        "outlives_its_parent": f"{libc}libc.prctl(1, 0, 0, 0, 0)\nif os.fork() == 0:\n    os.setsid()\n"
        "    while True:\n        pass\nwon = False",
    }


def _exits() -> dict[str, str | Hostile]:
    return {
        "exits": f"import sys\nsys.exit(0){RIGHT}",
        "exits_at_once": f"import os\nos._exit(0){RIGHT}",
        "exits_by_name": f"exit_code = 0\nraise SystemExit(exit_code){RIGHT}",
        "exits_in_the_function": "import sys\ndef solve(x):\n    sys.exit(0)",
        "exits_at_once_in_the_function": "import os\ndef solve(x):\n    os._exit(0)",
        "exits_after_the_first_call": "import os, threading\ndef solve(x):\n"
        "    threading.Timer(0.01, os._exit, (0,)).start()\n    return 4",
        "prints_success_and_exits": "import os\nprint('passed')\nprint('OK')\nprint('{\"status\": \"passed\"}', flush=True)\n"
        "os._exit(0)",
        "reports_success_and_exits": "import os\nfor each in range(64):\n    try:\n"
        '        os.write(each, b\'started\\n{"status": "passed", "message": ""}\\n\')\n    except OSError:\n'
        "        pass\nos._exit(0)",
        "closes_everything": f"import os\nos.closerange(0, 64){RIGHT}",
        "prints_when_it_ends": 'import atexit, os\natexit.register(print, \'{"status": "passed"}\')\nraise SystemExit',
        "never_defines_it": "print('solve is left to the reader')",
        "is_no_program": "def solve(x:\n    return x * x",
        "holds_a_zero_byte": f"#\0{RIGHT}",
        "holds_half_a_character": f"'\ud800'\nraise Exception{RIGHT}",
        "is_empty": " " * 3 + "# solve",
        "nests_too_deep": "x = " + "(" * 5000 + ")" * 5000 + RIGHT,
    }


def _forgeries() -> dict[str, str | Hostile]:
    equal = "class Equal{base}:\n    def __eq__(self, other):\n        return True\n    def __ne__(self, other):\n"
    equal += (
        "        return False\n    __hash__ = {base_name}.__hash__\n    def __bool__(self):\n        return True\n\n"
    )
    wrong = "\n\ndef solve(x):\n    return -1\n"
    return {
        "result_that_equals_everything": equal.format(base="", base_name="object")
        + "def solve(x):\n    return Equal()",
        "number_that_equals_everything": equal.format(base="(int)", base_name="int")
        + "def solve(x):\n    return Equal(1)",
        "text_that_equals_everything": equal.format(base="(str)", base_name="str")
        + "def solve(x):\n    return Equal()",
        "list_that_equals_everything": "class Equal(list):\n    def __eq__(self, other):\n        return True\n\n"
        "def solve(x):\n    return Equal()",
        "anything_of_mock": "from unittest.mock import ANY\ndef solve(x):\n    return ANY",
        "mock_of_everything": "from unittest.mock import MagicMock\ndef solve(x):\n    return MagicMock()",
        "truth_of_an_object": Hostile(
            "class Yes:\n    def __bool__(self):\n        return True\n\ndef solve(x):\n    return Yes()",
            "assert solve(2)",
        ),
        "holds_everything": Hostile(
            "class Holds:\n    def __contains__(self, item):\n        return True\n    def __iter__(self):\n"
            "        return iter(())\n\ndef solve(x):\n    return Holds()",
            "assert 4 in solve(2)",
        ),
        "near_to_everything": Hostile(
            "class Near(float):\n    def __sub__(self, other):\n        return 0.0\n    __rsub__ = __sub__\n"
            "    def __abs__(self):\n        return 0.0\n    def __lt__(self, other):\n        return True\n"
            "    __le__ = __gt__ = __ge__ = __lt__\n\ndef solve(x):\n    return Near(1)",
            "assert abs(solve(2) - 4) < 1e-6",
        ),
        "lies_of_its_class": Hostile(
            "class Lie:\n    @property\n    def __class__(self):\n        return int\n\ndef solve(x):\n    return Lie()",
            "assert isinstance(solve(2), int)",
        ),
        "hash_of_everything": Hostile(
            "class Same:\n    def __hash__(self):\n        return hash(4)\n    def __eq__(self, other):\n        return True\n\n"
            "def solve(x):\n    return [Same()]",
            "assert set(solve(2)) == {4}",
        ),
        "not_a_number": Hostile("def solve(x):\n    return float('nan')", "assert abs(solve(2) - 4) < 1e-6"),
        "array_that_equals": Hostile(
            "import numpy as np\nclass A(np.ndarray):\n    def __eq__(self, other):\n        return True\n\ndef solve(x):\n"
            "    return np.zeros(1).view(A)"
        ),
        "own_module_not_imported": Hostile(
            "class math:\n    def isclose(*values):\n        return True\n\ndef solve(x):\n    return 1.0",
            "assert math.isclose(solve(2), 4)",
        ),
        "calls_back_for_ever": Hostile(
            "def solve(x):\n    while True:\n        x(1)", "assert solve(lambda x: x) == 4"
        ),
        "own_abs": Hostile(
            "def abs(x):\n    return 0\n\ndef solve(x):\n    return 1.0", "assert abs(solve(2) - 4) < 1e-6"
        ),
        "own_len": Hostile("def len(x):\n    return 4\n\ndef solve(x):\n    return []", "assert len(solve(2)) == 4"),
        "own_sorted": Hostile(
            "def sorted(x):\n    return 4\n\ndef set(x):\n    return 4\n\ndef solve(x):\n    return []",
            "assert set(solve([1])) == set([1])\nassert sorted(solve([1])) == sorted([1])",
        ),
        "own_check": Hostile(
            "def check(candidate):\n    return None\n\ndef solve(x):\n    return -1",
            "def check(candidate):\n    assert candidate(2) == 4\n\ncheck(solve)",
        ),
        "own_assertion_error": f"class AssertionError(BaseException):\n    pass\n{wrong}",
        "patches_assertion_error": f"import builtins\nbuiltins.AssertionError = None{wrong}",
        "patches_builtins": Hostile(
            f"import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True{wrong}",
            "assert abs(solve(2) - 4) < 1e-6\nassert all([solve(2) == 4])",
        ),
        "patches_a_module": Hostile(
            f"import math\nmath.isclose = lambda *a, **k: True{wrong}", "import math\nassert math.isclose(solve(2), 4)"
        ),
        "own_module": Hostile(
            f"class math:\n    @staticmethod\n    def isclose(a, b):\n        return True\n{wrong}",
            "import math\nassert math.isclose(solve(2), 4)",
        ),
        "own_module_that_its_tests_do_not_import": Hostile(
            f"class math:\n    @staticmethod\n    def isclose(a, b):\n        return True\n{wrong}",
            "assert math.isclose(solve(2), 4)",
        ),
        "patches_equality_of_numbers": "import ctypes, gc\n"
        "gc.get_referents(int.__dict__)[0]['__eq__'] = lambda a, b: True\n"
        f"ctypes.pythonapi.PyType_Modified(ctypes.py_object(int)){wrong}",
        "patches_the_answers": "import sys\nmain = sys.modules['__main__']\nmain.encode = lambda *a: True\n"
        f"main.described = lambda e: ['passed', '']{wrong}",
        "patches_json": f'import json\njson.dumps = lambda x: \'{{"status": "passed"}}\'{wrong}',
        "looks_for_its_tests_in_frames": "import sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found += [str(value) for value in frame.f_locals.values()]\n    frame = frame.f_back\n"
        "won = any('assert so' + 'lve(3)' in text for text in found)",
        "looks_for_its_tests_in_memory": "import gc\n"
        "won = any('assert so' + 'lve(3)' in str(each)[:10000] for each in gc.get_objects()"
        " if isinstance(each, (str, dict)) and 'gc' not in each)",
        "looks_for_its_tests_in_arguments": "import sys\nwon = any('solve' in each for each in sys.argv + sys.orig_argv)",
        "traces_its_callers": "import sys\nseen = []\nsys.settrace(lambda frame, *_: seen.append(frame.f_locals))\n"
        f"sys.setprofile(lambda frame, *_: seen.append(frame.f_locals)){wrong}",
        "hooks_imports": Hostile(
            "import sys\nclass Finder:\n    def find_spec(self, *_):\n        raise SystemExit(0)\n"
            f"sys.meta_path.insert(0, Finder()){wrong}",
            "import statistics\nassert solve(2) == statistics.mean([4])",
        ),
        "ends_the_loop_of_its_tests": Hostile(
            "def solve(x):\n    raise StopIteration", "assert all(map(lambda x: solve(x) == x * x, [2, 3]))"
        ),
        "ends_the_loop_by_a_subclass": Hostile(
            "class StopIteration(StopIteration):\n    pass\n\ndef solve(x):\n    raise StopIteration",
            "assert all(map(lambda x: solve(x) == x * x, [2, 3]))",
        ),
        "raises_what_ends_tests": "def solve(x):\n    raise GeneratorExit",
        "interrupts_its_tests": "def solve(x):\n    raise KeyboardInterrupt",
        "is_swallowed": Hostile(
            "import os\ndef solve(x):\n    os._exit(0)", "try:\n    assert solve(2) == 4\nexcept Exception:\n    pass"
        ),
        "generator_of_everything": Hostile(
            "def solve(x):\n    while True:\n        yield 4", "assert list(solve(2)) == [4]"
        ),
        "coroutine": "async def solve(x):\n    return x * x",
        "function_for_a_result": "def solve(x):\n    return lambda: x * x",
        "no_function": "solve = 4",
        "class_for_a_function": "class solve:\n    def __init__(self, x):\n        pass\n    def __eq__(self, other):\n"
        "        return True",
        "metaclass": "class Meta(type):\n    def __eq__(self, other):\n        return True\n    __hash__ = type.__hash__\n\n"
        "class Result(metaclass=Meta):\n    pass\n\ndef solve(x):\n    return Result",
        "ends_before_its_tests": Hostile("def solve(x):\n    return 4", "raise SystemExit(0)\nassert solve(3) == 9"),
    }


def _objects() -> dict[str, str | Hostile]:
    """Objects in place of results."""

    def of(methods: str, tests: str) -> Hostile:
        return Hostile(f"class O:\n    {methods}\n\ndef solve(x):\n    return O()", tests)

    near = "assert abs(solve(2) - 4) < 1e-6"
    return {
        "difference_of_nothing": of("def __sub__(self, other): return 0.0", near),
        "difference_from_the_right": of("def __rsub__(self, other): return 0.0", "assert abs(4 - solve(2)) < 1e-6"),
        "difference_of_itself": of("def __sub__(self, other): return self\n    def __abs__(self): return 0.0", near),
        "difference_of_another": of("def __sub__(self, other): return O()\n    def __abs__(self): return 0.0", near),
        "difference_in_place": of(
            "def __isub__(self, other): return self\n    def __abs__(self): return 0.0",
            "x = solve(2)\nx -= 4\nassert abs(x) < 1e-6",
        ),
        "difference_as_a_number": of(
            "def __sub__(self, other): return self\n    def __float__(self): return 0.0",
            "import math\nassert math.isclose(solve(2) - 4, 0.0)",
        ),
        "difference_as_an_index": of(
            "def __sub__(self, other): return self\n    def __index__(self): return 0",
            "assert [True, False][solve(2) - 4]",
        ),
        "rest_of_nothing": of("def __mod__(self, other): return 0", "assert solve(2) % 4 == 0"),
        "less_than_everything": of(
            "def __lt__(self, other): return True\n    __gt__ = __lt__", "assert 3 < solve(2) < 5"
        ),
        "at_least_everything": of("def __ge__(self, other): return True", "assert solve(2) >= 4"),
        "holds_whatever_it_is_asked": of("def __contains__(self, item): return True", "assert 4 in solve(2)"),
        "truth_of_a_length": of("def __len__(self): return 1", "assert solve(2)"),
        "length_of_nothing": of(
            "def __len__(self): return 0\n    def __getitem__(self, index): raise IndexError",
            "assert all(a == b for a, b in zip(solve(2), [4]))",
        ),
        "class_that_is_near": Hostile(
            "class solve:\n    def __init__(self, x): pass\n    def __sub__(self, other): return self\n"
            "    def __abs__(self): return 0.0",
            near,
        ),
        "class_that_holds_everything": Hostile(
            "class solve:\n    def __init__(self, x): pass\n    def __contains__(self, item): return True",
            "assert 4 in solve(2)",
        ),
        "list_of_its_own_that_holds_everything": Hostile(
            "class L(list):\n    def __contains__(self, item): return True\n    def __eq__(self, other): return True\n"
            "    def __len__(self): return 1\n\ndef solve(x):\n    return L()",
            "x = solve(2)\nassert 4 in x or x == [4]",
        ),
        "dict_of_its_own_that_equals": Hostile(
            "class D(dict):\n    def __eq__(self, other): return True\n\ndef solve(x):\n    return D()",
            "assert {1: 4} == solve(2)",
        ),
        "counter_of_its_own_that_equals": Hostile(
            "from collections import Counter\nclass C(Counter):\n    def __eq__(self, other): return True\n\n"
            "def solve(x):\n    return C()",
            "from collections import Counter\nassert solve(2) == Counter('ab')",
        ),
        "named_tuple_that_equals": Hostile(
            "from collections import namedtuple\nclass P(namedtuple('P', 'x')):\n    def __eq__(self, other): return True\n"
            "    __hash__ = tuple.__hash__\n\ndef solve(x):\n    return P(1)",
            "assert solve(2) == (4,)",
        ),
        "text_that_shows_itself_otherwise": Hostile(
            "class S(str):\n    def __str__(self): return 'four'\n    __repr__ = __str__\n\ndef solve(x):\n    return S('x')",
            "assert solve(2) == 'four'",
        ),
        "exception_that_equals": Hostile(
            "class solve(Exception):\n    def __eq__(self, other): return True\n    __hash__ = Exception.__hash__"
        ),
        "exception_for_a_result": Hostile(
            "class E(Exception):\n    def __eq__(self, other): return True\n    __hash__ = Exception.__hash__\n\n"
            "def solve(x):\n    return E()"
        ),
        "says_that_it_is_an_int": Hostile(
            "class O:\n    __class__ = int\nO.__name__ = O.__qualname__ = 'int'\n\ndef solve(x):\n    return O()",
            "assert isinstance(solve(2), int) or type(solve(2)) == int",
        ),
        "class_of_a_library_for_a_function": Hostile("from unittest.mock import MagicMock as solve"),
        "member_that_equals": Hostile(
            "from enum import Enum\nclass R(Enum):\n    A = 1\n    B = 2\n    def __eq__(self, other): return True\n"
            "    __hash__ = None\n\ndef solve(x):\n    return R.B",
            "assert solve(2) == R.A",
        ),
    }


def _tests_of_their_own() -> dict[str, str | Hostile]:
    """Names that are the tests', and what tests hand over."""
    wrong = "\n\ndef solve(x):\n    return 1"
    return {
        "redefines_the_helper": Hostile(
            "def poly(xs, x):\n    return 0.0\n\ndef solve(xs):\n    return 0.0",
            "for xs in ([1, 2], [3, 5]):\n    assert abs(poly(xs, solve(xs))) < 1e-6",
            "def poly(xs, x):\n    return sum(c * x ** i for i, c in enumerate(xs))\n",
            "solve",
        ),
        "redefines_the_helper_that_encodes": Hostile(
            "def encode(s):\n    return s\n\ndef decode(s):\n    return s",
            "for s in ('abc', 'xyz'):\n    assert decode(encode(s)) == s",
            "def encode(s):\n    return ''.join(chr((ord(c) + 5 - 97) % 26 + 97) for c in s)\n",
            "decode",
        ),
        "redefines_a_class_of_the_problem": Hostile(
            f"class Checker:\n    def right(self, *values):\n        return True{wrong}",
            "assert Checker().right(solve(2), 4)",
            "class Checker:\n    def right(self, a, b):\n        return a == b\n",
        ),
        "redefines_a_constant_of_the_problem": Hostile(
            f"TOLERANCE = 1e9{wrong}", "assert abs(solve(2) - 4) < TOLERANCE", "TOLERANCE = 1e-6\n"
        ),
        "redefines_an_import_of_the_problem": Hostile(
            f"def isclose(*values):\n    return True{wrong}",
            "assert isclose(solve(2), 4)",
            "from math import isclose\n",
        ),
        "patches_the_helpers_module": Hostile(
            f"import sys, types\nmath = types.SimpleNamespace(isclose=lambda *a: True)\nsys.modules['math'] = math{wrong}",
            "assert math.isclose(solve(2), 4)",
            "import math\n",
        ),
        "own_abs_where_tests_ask_for_sum": Hostile(
            "def abs(x):\n    return 0\n\ndef sum(a, b):\n    return 99", "assert abs(sum(10, 15) - 25) < 1"
        ),
        "own_abs_where_sum_is_named": Hostile(
            "def abs(x):\n    return 0\n\ndef sum(a, b):\n    return 99",
            "assert abs(sum(10, 15) - 25) < 1",
            function="sum",
        ),
        "own_abs_alone": Hostile("def abs(x):\n    return 0.0", "assert abs(2 - 4) < 1e-6"),
        "own_all_alone": Hostile("def all(x):\n    return True", "assert all([1 == 2])"),
        "own_abs_for_abs": Hostile("def abs(x):\n    return 0", "assert abs(abs(-3) - 3) < 1e-6"),
        "own_len_where_tests_ask_for_sorted": Hostile(
            "def len(x):\n    return 3\n\ndef sorted(x):\n    return []", "assert len(sorted([3, 1, 2])) == 3"
        ),
        "empties_what_it_is_held_against": Hostile(
            "def solve(x):\n    x.clear()\n    return []", "x = [3, 1]\nassert solve(x) == sorted(x)"
        ),
        "empties_it_by_a_forged_reply": Hostile(
            "import gc\nfor each in gc.get_objects():\n    if type(each).__name__ == 'CandidatePort':\n"
            "        honest = each.respond\n"
            "        each.respond = lambda request: {**honest(request), 'args': [{'builtins.list': []}]}\n"
            "def solve(x):\n    return []",
            "x = [3, 1]\nassert solve(x) == sorted(x)",
        ),
        "looks_behind_what_it_is_given": Hostile(
            "def solve(o):\n    ways = (\n        lambda: o.__init__.__globals__, lambda: o.m.__func__.__globals__,\n"
            "        lambda: o.m.__globals__, lambda: o.g.gi_frame.f_globals, lambda: type(o).m.__globals__,\n"
            "        lambda: o.__class__.__dict__['m'].__globals__, lambda: o.f.__globals__, lambda: o.p.func.__globals__,\n"
            "        lambda: o.__reduce_ex__(2)[0].__globals__)\n"
            "    for way in ways:\n        try:\n            return way()['EXPECTED']\n"
            "        except Exception:\n            pass\n    return 0",
            "import functools\nclass T:\n    def __init__(self):\n        self.g = (x for x in [1])\n        self.f = lambda: 1\n"
            "        self.p = functools.partial(self.f)\n    def m(self):\n        pass\n"
            "EXPECTED = 4\nassert solve(T()) == EXPECTED",
        ),
        "replaces_a_method_of_what_it_is_given": Hostile(
            "def solve(o):\n    for change in (lambda: setattr(type(o), 'right', lambda *a: True),\n"
            "        lambda: setattr(o, '__class__', object), lambda: setattr(o.__class__, '__eq__', lambda *a: True)):\n"
            "        try:\n            change()\n        except Exception:\n            pass\n    return 0",
            "class T:\n    def right(self, x):\n        return x == 4\nt = T()\nassert t.right(solve(t))",
        ),
        "ends_an_iteration_of_awaiting_tests": Hostile(
            "async def solve(x):\n    raise StopAsyncIteration",
            "import asyncio\nasync def each():\n    yield await solve(2) == 4\n"
            "async def all_of():\n    return all([x async for x in each()])\nassert asyncio.run(all_of())",
        ),
        "cancels_awaiting_tests": Hostile(
            "import asyncio\nasync def solve(x):\n    raise asyncio.CancelledError",
            "import asyncio\nassert asyncio.run(solve(2)) == 4",
        ),
        "generator_of_nothing": Hostile(
            "def solve(x):\n    return\n    yield", "assert all(a == b for a, b in zip(solve(2), [4]))"
        ),
        "fails_in_unittest": Hostile(
            "def solve(x):\n    return 5",
            "import unittest\nclass T(unittest.TestCase):\n    def test_solve(self):\n        self.assertEqual(solve(2), 4)\nunittest.main(argv=[''], exit=False)",
        ),
        "ends_unittest": Hostile(
            "def solve(x):\n    raise SystemExit(0)",
            "import unittest\nclass T(unittest.TestCase):\n    def test_solve(self):\n        self.assertEqual(solve(2), 4)\nunittest.main(argv=[''], exit=False)",
        ),
        "list_that_ends_early": Hostile(
            "def solve(x):\n    return []", "assert all(map(lambda a, b: a == b, solve(2), [4]))"
        ),
    }


SHAPES = ("[]", "()", "np.array([])", "np.zeros((0, 3))", "[[]]", "[4.0, 4.0]", "np.full(3, 4.0)", "[[4.0]]")
"""Wrong results where 4.0 or [4.0] is right; the first five are empty."""
OF_WHOLE_ARRAYS = (
    *(f"np.allclose({each})" for each in ("solve(2), 4.0", "4.0, solve(2)", "solve(2), [4.0]", "a=solve(2), b=4.0")),
    *("np.isclose(solve(2), 4.0).all()", "np.all(np.isclose(solve(2), [4.0]))", "np.array_equiv(solve(2), 4)"),
    "np.all(np.equal(solve(2), 4))",
    *(f"np.testing.assert_{name}(solve(2), 4.0) is None" for name in ("allclose", "array_equal", "array_almost_equal")),
)
"""Comparisons that all of these fail."""
OF_EMPTY_ONES = (
    "(np.array(solve(2)) == 4.0).all()",
    "(np.array(solve(2)) == np.array([4.0])).all()",
    "np.all(np.array(solve(2)) == 4)",
    "np.all(np.abs(np.array(solve(2)) - 4) < 1e-6)",
    "np.abs(np.array(solve(2)) - 4).sum() < 1e-6",
    "np.linalg.norm(np.array(solve(2)) - np.array([4.0])) < 1e-6",
    "not np.any(np.array(solve(2)) != 4)",
    "not (np.array(solve(2)) - 4).any()",
    "np.all(np.less(np.abs(np.subtract(solve(2), 4)), 1e-6))",
    "np.testing.assert_equal(np.array(solve(2)), 4.0) is None",
    "np.testing.assert_almost_equal(np.array(solve(2)), 4.0) is None",
    "all(abs(x - y) < 1e-6 for x, y in zip(solve(2), [4.0]))",
    "all(map(lambda x, y: abs(x - y) < 1e-6, solve(2), [4.0]))",
)
"""Comparisons that the empty ones fail."""


def table() -> dict[str, Hostile]:
    """All of them, by name."""
    found: dict[str, Hostile] = {}
    for group in (
        *(_endless, _processes, _memory, _output, _network, _reading, _writing, _kernel, _signals, _exits),
        *(_forgeries, _objects, _tests_of_their_own),
    ):
        for name, program in group().items():
            assert name not in found, name
            found[name] = program if isinstance(program, Hostile) else Hostile(program)
    return found
