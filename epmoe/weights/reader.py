"""Bytes of a file → a tensor on any device, with a bounded amount of host memory in flight.

    cpu            preadv straight into the tensor's own memory
    accelerator    a few threads, each: take a pinned buffer from the ring → preadv into it → asynchronous copy on a
                   side stream → give it back; the copies of some buffers run while others are being read

The ring is all the host memory that a device read uses: `buffers` × `buffer_bytes`.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

import torch

from epmoe.errors import UserError

Span = tuple[int, int]  # offset in the file, bytes


class Reader:
    """Reads spans of files into tensors and counts the bytes. Not for use from several threads at once."""

    def __init__(self, threads: int = 4, buffers: int = 8, buffer_bytes: int = 8 << 20) -> None:
        self.threads, self.buffers, self.buffer_bytes = threads, buffers, buffer_bytes
        self.bytes_read = 0
        self._ring: _PinnedRing | None = None

    def read(self, file: Path, spans: Sequence[Span], out: torch.Tensor) -> None:
        """Fill `out` (contiguous, of the spans' total size) with the spans' bytes, one after the other.

        On an accelerator the caller's stream waits for the copies, the host only for the reads.

        Raises:
            UserError: the file cannot be read or ends early.
        """
        assert out.is_contiguous() and out.nbytes == sum(size for _, size in spans), (file, out.shape, spans)
        byte = out.view(-1).view(torch.uint8)
        if not byte.numel():
            return
        fd = _open(file)
        try:
            if out.device.type == "cpu":
                _read_into(fd, file, spans, byte)
            else:
                if self._ring is None or self._ring.device != out.device:
                    self._ring = _PinnedRing(out.device, self.threads, self.buffers, self.buffer_bytes)
                self._ring.read(fd, file, spans, byte)
        finally:
            os.close(fd)
        self.bytes_read += byte.numel()

    def read_bytes(self, file: Path, offset: int, size: int) -> bytes:
        """Part of a file as bytes; for headers."""
        byte = torch.empty(size, dtype=torch.uint8)
        self.read(file, [(offset, size)], byte)
        return byte.numpy().tobytes()

    def close(self) -> None:
        """Free the ring and its threads; the next read makes new ones."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None


class _PinnedRing:
    """Pinned buffers, each with the event that marks the end of the copy out of it."""

    def __init__(self, device: torch.device, threads: int, buffers: int, buffer_bytes: int) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="epmoe-read")
        self._free: SimpleQueue[tuple[torch.Tensor, torch.Event]] = SimpleQueue()
        self._buffer_bytes = buffer_bytes
        for _ in range(buffers):
            self._free.put((torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True), self._module.Event()))

    def read(self, fd: int, file: Path, spans: Sequence[Span], byte: torch.Tensor) -> None:
        caller = self._module.current_stream(self.device)
        self._stream.wait_stream(caller)  # the memory of `byte` may still be in use by work queued there
        jobs: list[Future[None]] = []
        done = 0
        for offset, size in spans:
            for at in range(0, size, self._buffer_bytes):
                part = byte[done + at : done + min(at + self._buffer_bytes, size)]
                jobs.append(self._pool.submit(self._move, fd, file, offset + at, part))
            done += size
        wait(jobs)  # all, before an error closes the file under the rest
        for job in jobs:
            job.result()
        caller.wait_stream(self._stream)

    def _move(self, fd: int, file: Path, offset: int, part: torch.Tensor) -> None:
        buffer, copied = self._free.get()
        try:
            copied.synchronize()
            source = buffer[: part.numel()]
            _read_into(fd, file, [(offset, part.numel())], source)
            # Whoever reads may be in inference mode, which a thread of the pool is not.
            with self._module.stream(self._stream), torch.inference_mode():
                part.copy_(source, non_blocking=True)
                copied.record(self._stream)
        finally:
            self._free.put((buffer, copied))

    def close(self) -> None:
        self._pool.shutdown()
        self._stream.synchronize()


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{file} cannot be opened: {error.strerror}") from error


def _read_into(fd: int, file: Path, spans: Sequence[Span], byte: torch.Tensor) -> None:
    """Fill the host tensor `byte`. Each turn of the loop reads at least one byte, so it ends."""
    view = byte.numpy().data
    done = 0
    for offset, size in spans:
        end = done + size
        while done < end:
            try:
                count = os.preadv(fd, [view[done:end]], offset)
            except OSError as error:
                raise UserError(f"{file} cannot be read at byte {offset}: {error.strerror}") from error
            if count == 0:
                raise UserError(f"{file} ends at byte {offset}, {end - done} bytes early: copy or download it again")
            done, offset = done + count, offset + count
