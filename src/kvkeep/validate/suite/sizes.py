"""Prompts of so many tokens, cut to what the engine can take."""

from dataclasses import dataclass

from kvkeep.validate.load import Sampling
from kvkeep.validate.prompts import Document, documents
from kvkeep.validate.suite.base import Context, SuiteReport

SAMPLE_WORDS = 400
"""Enough that the chat template hardly counts."""
TOKENS_PER_WORD = 1.6
"""Of this text with common tokenizers, where the server does not say."""
TEMPLATE_TOKENS = 160
"""Left for the chat template, the code word and the question."""
WORDS_LEAST = 16


@dataclass(frozen=True, slots=True)
class Cutter:
    """Makes documents of a wanted number of tokens."""

    context: Context
    tokens_per_word: float

    def fit(self, report: SuiteReport, name: str, num_tokens: int) -> int:
        """Tokens that fit the engine beside the answer; a size that gave way is reported."""
        most = self.context.subject.capabilities.max_model_len
        room = num_tokens
        if most is not None:
            room = max(1, most - report.sampling.max_tokens - TEMPLATE_TOKENS)
        fitted = min(num_tokens, room)
        report.sizes[name] = {"asked": num_tokens, "run": fitted}
        return fitted

    def documents(self, num: int, num_tokens: int, seed: int) -> list[Document]:
        """Distinct documents of about so many tokens each, the question left out."""
        num_words = max(WORDS_LEAST, int(num_tokens / self.tokens_per_word))
        num_words = min(num_words, len(self.context.words))
        return documents(num, num_words, seed, words=self.context.words)


async def make_cutter(context: Context) -> Cutter:
    """Ask the engine how many tokens its tokenizer makes of a word."""
    num_words = min(SAMPLE_WORDS, len(context.words))
    most = context.subject.capabilities.max_model_len
    if most is not None:
        # A sample that does not fit would teach nothing.
        num_words = max(WORDS_LEAST, min(num_words, (most - TEMPLATE_TOKENS) // 3))
    text = " ".join(context.words[:num_words])
    answer = await context.subject.engine.chat(text, Sampling(1), salt=context.new_run_id())
    if not answer.prompt_tokens:
        return Cutter(context, TOKENS_PER_WORD)
    return Cutter(context, max(1.0, answer.prompt_tokens / num_words))
