"""Programs that try to get out, to stay, to take more than their share, or to pass for what they are not.

Each prints "escaped" where the attempt worked; what it did besides is looked for on the machine. PATH, PORT, NAME and
PID stand for a file, a listening port, a listening socket without a file, and a process, all of them outside.
"""

from __future__ import annotations

GUARD = "import os; assert os.getpid() < 100, 'not isolated'\n"  # no attempt is made on a machine itself

C_LIBRARY = "import ctypes; c = ctypes.CDLL(None, use_errno=True)\n"

FILES = {
    "read passwords": "print('escaped', open('/etc/passwd').read())",
    "read a file outside": "print('escaped', open(PATH).read())",
    "write a file outside": "open(PATH, 'w').write('x'); print('escaped')",
    "append to a file outside": "open(PATH, 'a').write('x'); print('escaped')",
    "climb up": "print('escaped', open('../' * 40 + PATH).read())",
    "read through a symlink": "os.symlink(PATH, 'link'); print('escaped', open('link').read())",
    "write through a symlink": "os.symlink(PATH, 'link'); open('link', 'w').write('x'); print('escaped')",
    "symlink to the root": "os.symlink('/', 'top'); print('escaped', open('top' + PATH).read())",
    "hard link out": "os.link(os.__file__, 'os.py'); print('escaped')",
    "new file in the root": "open('/new', 'w').close(); print('escaped')",
    "new folder in the root": "os.mkdir('/new'); print('escaped')",
    "new file among devices": "open('/dev/new', 'w').close(); print('escaped')",
    "change the standard library": "open(os.__file__, 'a').write('#'); print('escaped')",
    "delete the standard library": "os.unlink(os.__file__); print('escaped')",
    "rights of the standard library": "os.chmod(os.__file__, 0o777); print('escaped')",
    "rename the standard library": "os.rename(os.path.dirname(os.__file__), '/tmp/lib'); print('escaped')",
    "installed packages": "import torch; print('escaped')",
    "homes and secrets": """
for path in ('/home', '/etc', '/var', '/run', '/sys', '/boot', '/srv', '/mnt', '/root/.ssh', '/usr/bin/env', '/bin/sh'):
    if os.path.exists(path):
        print('escaped', path)
""",
    "leave by chroot": "os.mkdir('x'); os.chroot('x'); os.chdir('../../../..'); print('escaped')",
    "proc": "print('escaped', os.listdir('/proc'))",
    "the parent's environment": "print('escaped', open(f'/proc/{os.getppid()}/environ').read())",
    "the first process's root": "print('escaped', os.listdir('/proc/1/root/etc'))",
    "control groups": "print('escaped', os.listdir('/sys/fs/cgroup'))",
    "the disk": """
import stat
os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); open('disk', 'rb').read(1); print('escaped')
""",
    "devices": """
for name in ('mem', 'kmem', 'kmsg', 'sda', 'vda', 'nvme0', 'fuse', 'kvm', 'tty', 'ptmx', 'shm', 'nvidia0', 'net/tun'):
    if os.path.exists('/dev/' + name):
        print('escaped', name)
""",
    "the scratch, deleted": "import shutil; shutil.rmtree('/tmp', True); os.rmdir('/tmp'); print('escaped')",
}

RIGHTS = {
    "become root": "os.setuid(0); print('escaped')",
    "become root's group": "os.setgroups([0]); os.setgid(0); print('escaped')",
    "mount a file system": C_LIBRARY + "print('escaped' if c.mount(b't', b'/tmp', b'tmpfs', 0, None) == 0 else '')",
    "mount proc": C_LIBRARY + "print('escaped' if c.mount(b'p', b'/tmp', b'proc', 0, None) == 0 else '')",
    "bind mount": C_LIBRARY + "print('escaped' if c.mount(b'/', b'/tmp', None, 4096, None) == 0 else '')",
    "write again": C_LIBRARY + "print('escaped' if c.mount(b'', b'/', None, 4096 | 32, None) == 0 else '')",
    "unmount": C_LIBRARY + "print('escaped' if c.umount2(b'/tmp', 2) == 0 else '')",
    "a user namespace": C_LIBRARY + "print('escaped' if c.unshare(0x10000000) == 0 else '')",
    "a mount namespace": C_LIBRARY + "print('escaped' if c.unshare(0x00020000) == 0 else '')",
    "a user namespace by clone": C_LIBRARY + """
pid = c.syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
print('escaped' if pid > 0 else '')
""",
    "capabilities": C_LIBRARY + """
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
print('escaped' if c.capset(header, (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)) == 0 else '')
""",
    "trace a process outside": C_LIBRARY + "print('escaped' if c.ptrace(16, PID, 0, 0) == 0 else '')",
    "memory of a process outside": C_LIBRARY + """
buffer = ctypes.create_string_buffer(8)
local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
remote = (ctypes.c_size_t * 2)(0x400000, 8)
print('escaped' if c.process_vm_readv(PID, local, 1, remote, 1, 0) > 0 else '')
""",
    "raise the limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        continue
    print('escaped', kind)
""",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('escaped')",
    "the machine's name": "import socket; socket.sethostname('mine'); print('escaped')",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, -20); print('escaped')",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); print('escaped')",
    "reboot": C_LIBRARY + "print('escaped' if c.reboot(0x89ABCDEF) == 0 else '')",
    "a shell": "print('escaped' if os.system('true') == 0 else '')",
    "somebody else's program": "os.execv('/usr/bin/su', ['su']); print('escaped')",
}

NETWORK = {
    "a port of this machine": "import socket; socket.create_connection(('127.0.0.1', PORT), 1); print('escaped')",
    "a socket without a file": """
import socket
socket.socket(socket.AF_UNIX).connect(NAME); print('escaped')
""",
    "the world": "import socket; socket.create_connection(('1.1.1.1', 53), 1); print('escaped')",
    "datagrams": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('10.0.0.1', 9)); print('escaped')",
    "names": "import socket; print('escaped', socket.getaddrinfo('example.com', 80))",
    "raw packets": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('escaped')",
    "multicast": "import socket as s; s.socket(type=s.SOCK_DGRAM).sendto(b'x', ('224.0.0.1', 9)); print('escaped')",
}

PROCESSES = {
    "kill everybody": "import signal; os.kill(-1, signal.SIGKILL); print('done')",
    "kill a process outside": "os.kill(PID, 9); print('escaped')",
    "stop a process outside": "os.kill(PID, 19); print('escaped')",
    "kill the parent": "os.kill(os.getppid(), 9); import time; time.sleep(0.2); print('done')",
    "kill the group": "os.killpg(0, 9)",
    "a daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time
        time.sleep(1000)
    os._exit(0)
""",
    "a daemon that keeps stdout": """
if os.fork() == 0:
    os.setsid()
    while True:
        os.write(1, b'.'); __import__('time').sleep(0.01)
""",
    "another interpreter": """
import sys
os.posix_spawn(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(1000)'], dict(os.environ))
""",
    "subprocess": "import subprocess; subprocess.Popen(['sleep', '1000']); print('escaped')",
    "reload what was taken away": "import importlib, os; importlib.reload(os); os.kill(PID, 9); print('escaped')",
    "fork bomb": """
while True:
    try:
        os.fork()
    except OSError:
        __import__('time').sleep(0.01)
""",
    "threads": """
import threading, time
started = 0
try:
    while started < 1000:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
print('escaped' if started > 64 else '')
""",
    "deaf to signals": """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
""",
    "sleep": "import time; time.sleep(1000)",
    "stop oneself": "os.kill(os.getpid(), 19)",
}

AMOUNTS = {
    "memory": "x = bytearray(1 << 30); print('escaped')",
    "memory in pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory shared": "import mmap; m = mmap.mmap(-1, 1 << 30); print('escaped')",
    "memory of many processes": """
import time
for k in range(10):
    if os.fork() == 0:
        x = bytearray(b'x') * (100 << 20)
        time.sleep(1000)
time.sleep(1000)
""",
    "memory in files": """
for k in range(100):
    with open(f'file{k}', 'wb') as file:
        file.write(bytes(8 << 20))
print('escaped')
""",
    "memory in files without a name": """
import time
files = [os.memfd_create('x') for _ in range(40)]
for file in files:
    os.write(file, bytes(15 << 20))
time.sleep(10)
print('escaped')
""",
    "a huge file": "open('huge', 'wb').write(bytes(64 << 20)); print('escaped')",
    "a sparse file": "open('sparse', 'wb').truncate(1 << 40); print('escaped')",
    "many files": """
for k in range(100_000):
    open(f'file{k}', 'w').close()
print('escaped')
""",
    "open files": "x = [open('/dev/null') for _ in range(1000)]; print('escaped')",
    "pipes": "x = [os.pipe() for _ in range(1000)]; print('escaped')",
    "sockets": "import socket; x = [socket.socketpair() for _ in range(1000)]; print('escaped')",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "recursion in C": "x = []\nfor _ in range(10**6): x = [x]\nprint(x)\nprint('escaped')",
    "big numbers": "x = 10 ** (10 ** 9)",
    "a flood of output": "while True: print('x' * 10_000)",
    "a flood of errors": "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
    "a flood past Python": "while True: os.write(1, b'x' * 100_000)",
    "a flood by a child": "if os.fork() == 0:\n    while True: os.write(1, b'x' * 999)\n__import__('time').sleep(1000)",
}

PRETENCE = {
    "exit": "import sys; sys.exit(0)",
    "exit with a text": "raise SystemExit('all tests passed')",
    "leave": "os._exit(0)",
    "another exit": "class Done(BaseException): pass\nraise Done()",
    "interrupt": "raise KeyboardInterrupt",
    "kill oneself": "os.kill(os.getpid(), 9)",
    "abort": "os.abort()",
    "crash": "import ctypes; ctypes.string_at(0)",
    "another program in place": "import sys; os.execv(sys.executable, [sys.executable, '-S', '-c', 'pass'])",
    "exit in a thread": """
import threading, time
threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)
""",
    "exit at the alarm": """
import signal
signal.signal(14, lambda *a: os._exit(0)); signal.setitimer(0, 0.1)
while True: pass
""",
    "leave in a child's place": "if os.fork(): os._exit(0)\nraise AssertionError",
    "print a token": "print('passed ' + '0' * 32); os._exit(0)",
    "write a token everywhere": """
for fd in range(1, 64):
    try:
        os.write(fd, b'passed ' + b'0' * 32)
    except OSError:
        pass
os._exit(0)
""",
    "spoil the channel": """
for fd in range(3, 64):
    try:
        os.write(fd, b'passed ')
    except OSError:
        pass
""",
    "stop the first process": C_LIBRARY + "c.ptrace(16, 1, 0, 0); os._exit(0)",
    "close everything": "os.closerange(0, 64)",
    "read the token": """
for fd in range(3, 64):
    try:
        token = os.read(fd, 100)
        os.write(fd + 1, b'passed ' + token)
    except OSError:
        continue
os._exit(0)
""",
    "other builtins": """
import builtins, sys
builtins.compile = builtins.exec = lambda *a, **k: None
os.write = os._exit = sys.__excepthook__ = lambda *a: None
assert False
""",
    "no error": "import sys; sys.excepthook = lambda *a: None\nassert False",
    "an error that fails": """
class Odd(Exception):
    def __str__(self): raise SystemExit(0)
raise Odd
""",
    "a guarded main": "if __name__ == '__main__': print('escaped')\nelse: raise AssertionError",
    "the shell's input": "print('escaped', input())",
    "wait for input": "import sys; print('escaped' if sys.stdin.read() else ''); assert False",
}

# they go on until they are ended
LASTING = {
    "stop the first process", "fork bomb", "deaf to signals", "sleep", "stop oneself", "recursion", "big numbers",
}  # fmt: skip
ATTEMPTS = FILES | RIGHTS | NETWORK | PROCESSES | AMOUNTS | PRETENCE
