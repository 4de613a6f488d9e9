"""Placing: which replica of the model is to answer a request. Counts tokens; knows no sockets, no threads.

    cost of a replica = tokens that wait and run there + the prompt's tokens - those that its prefix cache may have

The least cost has it. So a conversation stays with the replica that has answered it, and a long beginning that many
share draws them to where it is, as long as that replica is ahead by no more work than the beginning saves.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

MOST = 1 << 14  # beginnings that are remembered


class Placing:
    """What was sent where. One thread at a time.

    Args:
        page: tokens of a page of the cache: what is shorter is in no cache.
    """

    def __init__(self, page: int, most: int = MOST) -> None:
        self.page, self.most = page, most
        self.known: OrderedDict[tuple[int, int], set[int]] = OrderedDict()  # length and hash of a beginning → replicas

    def choose(self, ids: tuple[int, ...], tokens: Mapping[int, int]) -> int:
        """The replica for a prompt, which is remembered.

        Args:
            tokens: of the requests that each replica has.
        """
        keys = [*self._keys(ids)]
        had = {replica: length for length, hashed in keys for replica in self.known.get((length, hashed), ())}
        chosen = min(tokens, key=lambda each: (tokens[each] - had.get(each, 0), each))
        for key in keys:
            self.known.setdefault(key, set()).add(chosen)
            self.known.move_to_end(key)
        while len(self.known) > self.most:
            self.known.popitem(last=False)
        return chosen

    def forget(self, replicas: Iterable[int]) -> None:
        """They are no more."""
        gone = set(replicas)
        for known in self.known.values():
            known -= gone

    def _keys(self, ids: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Beginnings of one page, two, four, … so that what two prompts share is known to at least a half."""
        length = self.page
        while length <= len(ids):
            yield length, hash(ids[:length])
            length *= 2
