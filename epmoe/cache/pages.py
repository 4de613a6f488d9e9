"""Who holds which pages of the key/value cache: accounts on the host, no tensors, so that a scheduler can ask freely.

    handle = pages.admit(max_tokens)     a sequence's handle, and its pages
    pages.held[handle]                   their numbers, in order of position
    pages.release(handle)

Only layers with full attention use pages; a window's ring belongs to the handle (epmoe/cache/rows.py). The table of
pages that the device reads is written by `Cache.write`.
"""

from epmoe.errors import UserError


class CacheFull(Exception):
    """The sequence does not fit now; it will when others were released."""


class Pages:
    """`count` pages of `size` positions each, for up to `sequences` sequences at a time.

    Args:
        count: 0 where no layer has full attention; then handles alone are given out.
    """

    def __init__(self, count: int, size: int, sequences: int) -> None:
        self.count, self.size, self.sequences = count, size, sequences
        self.free = list(range(count))[::-1]
        self.free_handles = list(range(sequences))[::-1]
        self.held: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}  # handle → max_tokens

    def needs(self, max_tokens: int) -> int:
        """Pages of a sequence of that many positions."""
        return -(-max_tokens // self.size) if self.count else 0

    def fits(self, max_tokens: int) -> bool:
        """Whether a sequence of that many positions would be admitted now."""
        return bool(self.free_handles) and self.needs(max_tokens) <= len(self.free)

    def check(self, max_tokens: int) -> None:
        """Raises UserError for a sequence that would not fit into an empty cache either."""
        if self.needs(max_tokens) > self.count:
            raise UserError(
                f"a sequence of {max_tokens} tokens can never fit a cache of {self.count * self.size}: "
                "raise runtime.cache_tokens, or lower max_new_tokens"
            )

    def admit(self, max_tokens: int) -> int:
        """Reserve a sequence's pages; returns its handle.

        Raises:
            CacheFull: it does not fit now.
            UserError: see `check`.
        """
        assert max_tokens > 0
        self.check(max_tokens)
        if not self.fits(max_tokens):
            raise CacheFull(f"{max_tokens} tokens, {len(self.free)} pages and {len(self.free_handles)} sequences free")
        handle = self.free_handles.pop()
        self.held[handle] = [self.free.pop() for _ in range(self.needs(max_tokens))]
        self.reserved[handle] = max_tokens
        return handle

    def release(self, handle: int) -> None:
        """Give a sequence's pages and its handle back."""
        del self.reserved[handle]
        self.free.extend(reversed(self.held.pop(handle)))
        self.free_handles.append(handle)
