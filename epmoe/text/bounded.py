"""A stranger's program in a process of its own, which may take only so much time and memory.

    call ──JSON──▶ function ──JSON──▶ answer          or nothing: the system has ended the process

What a program does within one operation, a power of large numbers or a text repeated 10^10 times, no check around it
can stop: only the system can. The process imports neither torch nor the weights; it starts with the first call, stays
for the next ones, and ends with this process, however that ends.
"""

import atexit
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any

_LENGTH = struct.Struct("<Q")  # before each message: its bytes
ENDS_S = 10.0  # that a process which says nothing more may take to end by itself: only then it is known why
_FULL = 77  # the exit code of one that ran into its memory's limit
# The process finds its modules where this one does, not where it was started.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from epmoe.text.bounded import serve; serve({function!r}, {limits!r})"


class ExceededError(Exception):
    """The call took more than it may, or ended its process; says which, as the end of a sentence."""


@dataclass(frozen=True)
class Limits:
    """What a call may take: so much, and more by the megabyte (10^6 bytes) that it is given."""

    seconds: float = 1.0  # of a processor, so that other work on this machine does not count
    seconds_per_mb: float = 4.0
    memory_mb: float = 384.0  # beside Python and its modules
    memory_mb_per_mb: float = 24.0

    def of(self, size: int) -> tuple[float, int]:
        """Seconds and bytes of a call with `size` bytes."""
        given = size / 1e6
        memory = self.memory_mb + given * self.memory_mb_per_mb
        return self.seconds + given * self.seconds_per_mb, int(memory * 1e6)


class Bounded:
    """A function of one JSON value, named "module:function", that runs in a process of its own.

    For use from any thread; calls wait for each other.
    """

    def __init__(self, function: str, limits: Limits | None = None) -> None:
        self.function, self.limits = function, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork has none of its own
        self._lock = threading.Lock()

    def __call__(self, argument: Any) -> Any:
        """What the function makes of `argument`, both of them JSON.

        Raises:
            ExceededError: there is no answer; the next call may have one.
            ValueError, TypeError: `argument` is no JSON.
        """
        message = _packed(argument)
        seconds, memory = self.limits.of(len(message))
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                with suppress(BrokenPipeError):  # it has ended: there is no answer then
                    process.stdin.write(message)
                    process.stdin.flush()
                # By the clock ten times as long: a machine may be busy, but nothing waits for ever.
                answer = _unpacked(process.stdout, time.monotonic() + 60 + 10 * seconds)
                if answer is not None:
                    return answer[0]
            except BaseException:  # Ctrl-C, too: what is left in the pipes would answer the next call
                self._end()
                raise
            code = self._end(ENDS_S)
        raise ExceededError(_why(code, seconds, memory))

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            program = _PROGRAM.format(path=sys.path, function=self.function, limits=tuple(vars(self.limits).values()))
            command = [sys.executable, "-c", program]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            self._owner = os.getpid()
            atexit.register(self._end)
        return self._process

    def _end(self, within_s: float = 0.5) -> int | None:
        """End the process, which may do so itself; how it ended; None: not by itself."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        atexit.unregister(self._end)
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            return process.wait(within_s)  # at the end of its input it ends by itself
        except subprocess.TimeoutExpired:
            return None
        finally:  # after Ctrl-C, too
            process.kill()
            process.stdout.close()
            process.wait()


def _why(code: int | None, seconds: float, memory: int) -> str:
    if code is None:
        return "neither answers nor ends"
    if code == -signal.SIGPROF:
        return f"runs for more than {seconds:.3g} s"
    if code in (_FULL, -signal.SIGKILL):  # by itself, or by a system that is out of memory
        return f"takes more than {memory / 1e6:,.0f} MB of memory"
    return f"has ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


def _packed(value: Any) -> bytes:
    """A message. Text may hold half a surrogate pair, which JSON can spell."""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(data)) + data


def _unpacked(stream: IO[bytes], deadline: float) -> Any:
    """The next message's value; None at the end of the stream, or when the time is over."""
    data, wanted = bytearray(), _LENGTH.size
    while len(data) < wanted:
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(stream.fileno(), min(wanted - len(data), 1 << 20)) if ready else b""
        if not part:
            return None
        data += part
        if len(data) == wanted == _LENGTH.size:
            wanted += _LENGTH.unpack(data)[0]
    return _loads(data[_LENGTH.size :])


def _loads(data: bytes | bytearray) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


def serve(function: str, limits: tuple[float, ...]) -> None:
    """The other end: answer calls until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: for the process that called
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    # What the function prints must not stand between the messages.
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    module, name = function.split(":")
    called = getattr(import_module(module), name)
    while head := calls.read(_LENGTH.size):
        size = _LENGTH.unpack(head)[0]
        try:
            _bound(*Limits(*limits).of(_LENGTH.size + size))
            answers.write(_packed([called(_loads(calls.read(size)))]))
            answers.flush()
            signal.setitimer(signal.ITIMER_PROF, 0)
        except MemoryError:
            os._exit(_FULL)


def _bound(seconds: float, memory: int) -> None:
    """From now on, this process may run so many seconds and take so many bytes more."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # at its end the system ends the process
    with suppress(ValueError, OSError):  # a system that knows no such limit
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = _mapped() + memory
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _mapped() -> int:
    """Bytes of address space that this process has already."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
