"""The inner side: limits, one program, a report. A fresh Python gets this file as text, the package is not there.

The parent sends a secret token and the program. Only when the program's last statement has returned is the token sent
back, over a pipe of its own; an early exit, output or a signal cannot look like that. The program runs in this very
interpreter, so one that walks the frames up to here can read the token: that is the limit of what this proves.
"""

import os
import resource
import sys

READY = b"ready\n"
LENGTH_BYTES = 16  # of the program's length, in decimal digits
PASSED, RAISED = b"passed ", b"raised "
TOKEN_BYTES = 32
MODULE = "program"  # not "__main__": a guarded main would wait for input, or run somebody's tests
ERROR_CHARS = 500
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # the system call's number
KEYCTL_JOIN_SESSION_KEYRING = 1


def leave_keyring() -> None:
    """Take an empty session keyring: the caller's may hold secrets, and no namespace hides it."""
    import ctypes  # takes long to import, and not every program needs this
    import errno

    libc = ctypes.CDLL(None, use_errno=True)
    number = KEYCTL[os.uname().machine]
    if libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None) == -1:
        error = ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EPERM):  # no keys here, or the program cannot ask for them either
            raise OSError(error, f"a session keyring: {os.strerror(error)}")


def become_nobody(folder: str, uid: int) -> None:
    """As root: shut this process into `folder`, where no user namespaces can be made, and give up every right."""
    os.chroot(folder)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits by the kernel's names, such as {"RLIMIT_AS": bytes}; never above those that are there."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def run(control_fd: int, result_fd: int, limits: dict[str, int]) -> None:
    """Say that all is set up, receive the program, run it, report. Does not return."""
    if os.getpid() != os.getsid(0):
        os.setsid()  # the launcher is in the old group, and a signal to one's group reaches all of it
    set_limits(limits)
    write, leave, number, me = os.write, os._exit, os.getpid, os.getpid()  # the program may put others in their place
    write(result_fd, READY)
    with open(control_fd, "rb") as control:
        token, length = control.read(TOKEN_BYTES), control.read(LENGTH_BYTES)
        source = control.read(int(length or 0))
    if not length:
        leave(1)  # the parent has died or given up
    module = type(sys)(MODULE)
    sys.modules[MODULE] = sys.modules["__main__"] = module
    try:
        exec(compile(source, f"<{MODULE}>", "exec", dont_inherit=True), module.__dict__)
        report = PASSED + token
    except BaseException as error:
        report = RAISED + describe(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue
    if number() == me:  # not a child that the program has forked
        write(result_fd, report)
    leave(0)


def describe(error: BaseException) -> bytes:
    """Kind and text of an exception; its traceback goes to stderr."""
    try:
        trace = error.__traceback__
        sys.__excepthook__(type(error), error, trace and trace.tb_next)
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:
        text = type(error).__name__
    return text[:ERROR_CHARS].encode("utf-8", "replace")
