"""A model small enough for a self-test: attention over all of its KV, in numpy, equal to the bit.

Its weights mean nothing. What counts is that each answer is made from every byte of KV, by softmax
attention in every layer and head, as in a real model; and that equal bytes give equal bits.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvkeep.model.layout import KvLayout
from kvkeep.validate.answer import Answer, TokenStep
from kvkeep.validate.self_test.faults import Block

NUM_LAYERS, NUM_HEADS, BLOCK_TOKENS, HEAD_DIM = 4, 2, 16, 16
VOCABULARY = 512
ANSWER_TOKENS = 8
NUM_ALTERNATIVES = 5
_PAGE = (BLOCK_TOKENS, 2, HEAD_DIM)
"""Of float16: for each token its key, then its value."""

LAYOUT = KvLayout(
    num_layers=NUM_LAYERS,
    num_heads=NUM_HEADS,
    page_bytes=BLOCK_TOKENS * 2 * HEAD_DIM * 2,
    block_tokens=BLOCK_TOKENS,
    dtype="float16",
    page_format="self-test",
)

Floats = npt.NDArray[np.float32]


class SmallModel:
    """Computes KV from tokens, and answers from KV."""

    def __init__(self) -> None:
        chance = np.random.default_rng(7)
        width = NUM_LAYERS * NUM_HEADS * HEAD_DIM
        self._queries = chance.standard_normal((VOCABULARY, NUM_LAYERS, NUM_HEADS, HEAD_DIM))
        self._out = chance.standard_normal((width, VOCABULARY)) / np.sqrt(width)

    def compute(self, token_ids: Sequence[int]) -> list[Block]:
        """KV of every whole block before the last token, which depends on all tokens up to it."""
        blocks = []
        for end in range(BLOCK_TOKENS, len(token_ids), BLOCK_TOKENS):
            seen = hashlib.blake2b(repr(list(token_ids[:end])).encode(), digest_size=8).digest()
            chance = np.random.default_rng(int.from_bytes(seen))
            values = chance.standard_normal((NUM_LAYERS, NUM_HEADS, *_PAGE)).astype(np.float16)
            blocks.append(values.view(np.uint8).reshape(NUM_LAYERS, NUM_HEADS, -1))
        return blocks

    def answer(self, token_ids: Sequence[int], blocks: Sequence[Block]) -> Answer:
        """What follows from a prompt's KV and its last token."""
        pages = [
            block.reshape(-1).view(np.float16).reshape(NUM_LAYERS, NUM_HEADS, *_PAGE)
            for block in blocks
        ]
        kv = np.concatenate(pages, axis=2).astype(np.float32)
        token, steps = token_ids[-1] % VOCABULARY, []
        # Wrong bytes may well be no numbers; what comes of them is an answer like any other.
        with np.errstate(all="ignore"):
            for _ in range(ANSWER_TOKENS):
                step = self._step(token, kv)
                steps.append(step)
                token = int(step.token.removeprefix("token_id:"))
        text = " ".join(step.token for step in steps)
        return Answer(text=text, steps=tuple(steps), finish_reason="length")

    def _step(self, token: int, kv: Floats) -> TokenStep:
        keys, values = kv[:, :, :, 0], kv[:, :, :, 1]
        query = self._queries[token].astype(np.float32)
        scores = np.einsum("lhtd,lhd->lht", keys, query) / np.float32(np.sqrt(HEAD_DIM))
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        seen = np.einsum("lht,lhtd->lhd", weights, values).reshape(-1)
        logits = np.nan_to_num(np.tanh(seen) @ self._out.astype(np.float32), nan=-1e9)
        logprobs = logits - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        best = np.argsort(-logprobs, kind="stable")[:NUM_ALTERNATIVES]
        top = tuple((f"token_id:{idx}", float(logprobs[idx])) for idx in best.tolist())
        return TokenStep(*top[0], top)
