"""Watched: what becomes of one request, for metrics and the log. None of its text."""

import time
from collections.abc import Sequence

from epmoe.server.metrics import Metrics
from epmoe.text.delivery import Delivery, Piece


class Watched:
    """One request of a client, from its head to the end of its answer. Times in seconds."""

    def __init__(self, metrics: Metrics, path: str) -> None:
        self.metrics, self.path = metrics, path
        self.began, self.began_s = time.time(), time.perf_counter()
        self.status = 0  # sent, or 499: the client went away
        self.gone = False  # so it did
        self.body = 0  # bytes of it that are held
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.reasons: list[str] = []
        self.first_s: float | None = None
        self.last_s: dict[tuple[int, int], float] = {}  # of an answer's last token

    def asked(self, deliveries: Sequence[Delivery]) -> None:
        """These wait for their turn now."""
        self.prompt_tokens = sum(len(each.prompt.ids) for each in deliveries)
        self.metrics.prompt_tokens.inc(self.prompt_tokens)

    def came(self, number: int, pieces: Sequence[Piece]) -> None:
        """Tokens of some answers to a prompt."""
        now = time.perf_counter()
        for piece in pieces:
            if not piece.ids:
                continue
            if self.first_s is None:
                self.first_s = now - self.began_s
                self.metrics.first_token.observe(self.first_s)
            if (last := self.last_s.get((number, piece.index))) is not None:
                for _ in piece.ids:
                    self.metrics.between.observe((now - last) / len(piece.ids))
            self.last_s[number, piece.index] = now
            self.completion_tokens += len(piece.ids)
            self.metrics.completion_tokens.inc(len(piece.ids))

    def said(self, deliveries: Sequence[Delivery]) -> None:
        """Nothing more comes."""
        parts = [part for each in deliveries for part in each.parts]
        self.reasons = [part.answer.finish_reason if part.answer.finished else "abort" for part in parts]
        self.cached_tokens = sum(part.result.cached_tokens for part in parts if part.result)
        self.metrics.cached_tokens.inc(self.cached_tokens)

    def failed(self, status: int) -> None:
        """After its status was sent."""
        self.status = status

    def record(self) -> dict[str, object]:
        """The line of the log."""
        return {
            "time": round(self.began, 3),
            "path": self.path,
            "status": 499 if self.gone else self.status,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "finish_reasons": self.reasons,
            "first_token_s": None if self.first_s is None else round(self.first_s, 6),
            "total_s": round(time.perf_counter() - self.began_s, 6),
        }
