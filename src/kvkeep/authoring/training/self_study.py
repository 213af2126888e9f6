"""Conversations about a document that the model makes up while it reads the document.

It is asked for questions about one passage after the other and answers some of them itself; else
the passage is the answer. What it says need not be right: the cartridge learns to expect what the
model expects when it has the document, token by token.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from kvkeep.authoring.models import Author
from kvkeep.authoring.texts import answer_ids, question_ids
from kvkeep.authoring.training.forward import Layers
from kvkeep.authoring.training.sampling import Draw, sample
from kvkeep.authoring.training.settings import TrainingSettings

BATCH = 16
"""Conversations that are made up at once."""
SENTENCES_MAX, PASSAGE_CHARS_MAX = 2, 240
"""Of one passage."""
QUESTION_TOKENS_MAX = 32
ASKING_TEMPERATURE, ANSWERING_TEMPERATURE = 0.8, 0.2
HELD_OUT_EVERY = 8
_ASK = (
    "Here is a part of the text: {passage}\nWrite one short question about this part. "
    "Write only the question.",
    "{passage}\n\nWrite a question that is answered by this sentence.",
    "Here is a part of the text: {passage}\nWrite one question that asks for a name, a number or a "
    "detail in this part. Write only the question.",
)
_RECITE = (
    'Repeat the part of the text that begins with "{words}".',
    'What does the text say after "{words}"?',
    'How does this sentence go on: "{words}"?',
)
_ABOUT = (
    'What does the text say about "{words}"?',
    "Tell me about {words}.",
    "What do you know about {words}?",
)
_PUNCTUATION = " .,;:!?\"'()"
_KINDS = ("ask", "about", "recite", "tell")
"""In turns: a question and the model's own answer; some words and the passage that has them; a
passage from its middle on; a question and the passage as its answer."""


class Conversation(msgspec.Struct, frozen=True):
    """One question and its answer, as token ids behind a document."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        """Both."""
        return self.prompt_ids + self.answer_ids


def passages_of(text: str) -> list[str]:
    """Sentences, and runs of two where both are short, in order."""
    sentences = [each for each in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if each.strip()]
    found = []
    for start, sentence in enumerate(sentences):
        cuts = range(0, len(sentence), PASSAGE_CHARS_MAX)
        found += [sentence[cut : cut + PASSAGE_CHARS_MAX] for cut in cuts]
        run = sentences[start : start + SENTENCES_MAX]
        if len(run) == SENTENCES_MAX and sum(map(len, run)) < PASSAGE_CHARS_MAX:
            found.append(" ".join(run))
    return found


def is_held_out(conversation_idx: int) -> bool:
    """Whether a conversation is never trained on."""
    return conversation_idx % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


@dataclass(frozen=True)
class Reader:
    """A model that has the document before it."""

    author: Author
    layers: Layers
    """The document's KV."""
    settings: TrainingSettings
    check: Callable[[], None] = lambda: None
    """Called often; what it raises ends the making up."""

    def say(
        self, prompts: Sequence[list[int]], tokens_max: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Continue prompts, without their ends."""
        return sample(
            self.author.model,
            self.layers,
            prompts,
            tokens_max=tokens_max,
            draw=Draw(temperature, seed, self.ends),
            check=self.check,
        )

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        end_id = self.author.tokenizer.eos_token_id
        return frozenset(() if end_id is None else (int(end_id),))


def make_up(
    reader: Reader, text: str, made: Sequence[Conversation] = ()
) -> Iterator[list[Conversation]]:
    """Make up conversations, a batch at a time; equal settings give equal ones.

    Args:
        reader: The model with the document.
        text: The document.
        made: Those that were made before, which are not made again: whole batches.
    """
    passages, settings = passages_of(text), reader.settings
    for start in range(len(made), settings.num_conversations, BATCH):
        count = min(BATCH, settings.num_conversations - start)
        draw = random.Random(f"{settings.seed} {start}")
        plans = [_plan(start + idx, passages, settings.seed) for idx in range(count)]
        asked = [idx for idx, plan in enumerate(plans) if plan.kind in ("ask", "tell")]
        made_up = _questions(reader, [plans[idx].passage for idx in asked], draw)
        for idx, question in zip(asked, made_up, strict=True):
            plans[idx] = replace(plans[idx], question=question)
        plans = [plan if plan.question else _drawn(plan, draw) for plan in plans]
        yield _conversations(reader, plans, draw.getrandbits(32))


@dataclass(frozen=True)
class _Plan:
    """What one conversation is about."""

    kind: str
    passage: str
    question: str = ""


def _plan(conversation_idx: int, passages: Sequence[str], seed: int) -> _Plan:
    """Every kind meets every passage before any comes again."""
    turn, kind_idx = divmod(conversation_idx, len(_KINDS))
    order = list(passages)
    random.Random(f"{seed} {kind_idx} {turn // len(order)}").shuffle(order)
    return _Plan(_KINDS[kind_idx], order[turn % len(order)])


def _drawn(plan: _Plan, draw: random.Random) -> _Plan:
    """A question made of a passage's own words, and what answers it."""
    words = plan.passage.split()
    if plan.kind == "about":
        count = draw.randint(1, min(3, len(words)))
        start = draw.randrange(len(words) - count + 1)
        shown = " ".join(words[start : start + count]).strip(_PUNCTUATION)
        return replace(plan, question=draw.choice(_ABOUT).format(words=shown))
    start = draw.randrange(max(len(words) // 2, 1))
    shown = " ".join(words[start : start + draw.randint(3, 5)])
    question = draw.choice(_RECITE).format(words=shown)
    return replace(plan, question=question, passage=" ".join(words[start:]))


def _questions(reader: Reader, passages: list[str], draw: random.Random) -> list[str]:
    tokenizer = reader.author.tokenizer
    prompts = [draw.choice(_ASK).format(passage=passage) for passage in passages]
    said = reader.say(
        [question_ids(tokenizer, prompt) for prompt in prompts],
        QUESTION_TOKENS_MAX,
        ASKING_TEMPERATURE,
        draw.getrandbits(32),
    )
    return [_first_question(tokenizer, each) for each in said]


def _conversations(reader: Reader, plans: list[_Plan], seed: int) -> list[Conversation]:
    """The model's own answer where it is asked, else the passage."""
    tokenizer, tokens_max = reader.author.tokenizer, reader.settings.answer_tokens_max
    prompts = [question_ids(tokenizer, plan.question) for plan in plans]
    answers = [answer_ids(tokenizer, plan.passage) for plan in plans]
    own = [idx for idx, plan in enumerate(plans) if plan.kind == "ask"]
    said = reader.say([prompts[idx] for idx in own], tokens_max, ANSWERING_TEMPERATURE, seed)
    for idx, each in zip(own, said, strict=True):
        # What was cut off has no end to be learnt.
        answers[idx] = each + (sorted(reader.ends) if len(each) < tokens_max else [])
    return [Conversation(*both) for both in zip(prompts, answers, strict=True)]


def _first_question(tokenizer: Any, token_ids: list[int]) -> str:
    said = str(tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
    line = said.splitlines()[0] if said else ""
    return line.partition("?")[0].strip(' "*') + "?"
