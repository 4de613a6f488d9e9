"""How far a head's drafts are right: the target's greedy answers to held-out text, and the head beside them.

With the target's answer known, every draft that the head would make along it is known, too. An answer is walked through
as a decoder would: a step brings what the draft has right, and one token more, the target's own.

    answer          a b c d e f g
    draft at a        b c x             brings b c d: two right, and the target's d
    draft at d              e f g       …

Letters: B answers · P tokens of a prompt · S positions · X = 3H.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.train import data
from scripts.train.eagle3 import TrainableHead, features
from scripts.train.model import TrainableGptOss


@dataclass(frozen=True)
class Answers:
    """What is measured: so many prompts of the held-out text, spread evenly, and so many greedy tokens of each."""

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 96

    def prompt_BP(self, directory: Path) -> Tensor:
        """int64 [B, P]."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return data.held_out_windows(tokenizer, self.prompt_tokens - 1, self.prompts)


@torch.no_grad()
def greedy(target: TrainableGptOss, prompt_BP: Tensor, new_tokens: int) -> Tensor:
    """int64 [B, P + new]: prompts and the target's answers, without a cache; an end of text does not end one."""
    token_BS = prompt_BP
    for _ in range(new_tokens):
        logits_BSV, _, _ = target(token_BS)
        token_BS = torch.cat((token_BS, logits_BSV[:, -1:].argmax(-1)), 1)
    return token_BS


def drafts(head: TrainableHead, target: TrainableGptOss, token_BS: Tensor, depth: int) -> Tensor:
    """int64 [B, S - 1, depth]: what the head drafts at each position, to follow the token after it."""
    feature_BSX, _ = features(target, head.shape.layers, token_BS[:, :-1])
    return head.drafts(target.model.embed_tokens, token_BS[:, 1:], feature_BSX, depth)


def right(token_BS: Tensor, draft_BSK: Tensor) -> Tensor:
    """int64 [B, S - 1]: how many of each position's drafted tokens are right, one after the other."""
    count = draft_BSK.shape[1]
    ahead = torch.nn.functional.pad(token_BS, (0, draft_BSK.shape[2]), value=-1)  # behind the end nothing is right
    follows_BSK = torch.stack([ahead[:, 2 + k : 2 + k + count] for k in range(draft_BSK.shape[2])], -1)
    return (draft_BSK == follows_BSK).long().cumprod(-1).sum(-1)


def walk(right_S: list[int], first: int, depth: int) -> tuple[int, int]:
    """(tokens, steps) of one answer: from position `first` to the last whose whole draft lies within the answer."""
    place, steps = first, 0
    while place < len(right_S) - depth:
        place += 1 + min(right_S[place], depth)
        steps += 1
    return place - first, steps


def measure(token_BS: Tensor, draft_BSK: Tensor, first: int) -> dict[str, Any]:
    """The figures of training.json.

    Args:
        first: the last position of the prompts.
    """
    right_BS, most = right(token_BS, draft_BSK), draft_BSK.shape[2]
    answer_BS = right_BS[:, first : right_BS.shape[1] - most]
    by_depth = {}
    for depth in range(1, most + 1):
        tokens, steps = map(sum, zip(*(walk(each, first, depth) for each in right_BS.tolist()), strict=True))
        by_depth[str(depth)] = round(tokens / steps, 4)
    return {
        "right_from_anywhere": [round((answer_BS >= k).double().mean().item(), 4) for k in range(1, most + 1)],
        "tokens_per_step_by_depth": by_depth,
    }
