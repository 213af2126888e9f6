"""Who asks what: conversations of several turns, and questions about shared documents."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

VOCABULARY = 50_000


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt, and what will be answered."""

    token_ids: Sequence[int]
    answer_ids: Sequence[int]
    user: str


Ended = Callable[[float], None]
"""Called with the time at which the answer ended."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Users who talk, each with one conversation at a time."""

    num_users: int = 48
    system_prompts: int = 3
    system_tokens: int = 512
    turns: tuple[int, int] = (3, 10)
    question_tokens: tuple[int, int] = (20, 200)
    answer_tokens: tuple[int, int] = (50, 250)
    think_s: float = 10.0
    """Mean time until the next question."""


@dataclass(frozen=True, slots=True)
class DocumentSettings:
    """Users who ask about documents, some of which are far more popular."""

    num_documents: int = 40
    document_tokens: tuple[int, int] = (1500, 5000)
    question_tokens: tuple[int, int] = (20, 80)
    answer_tokens: tuple[int, int] = (30, 120)
    asks_s: float = 5.0
    """Mean number of questions a second."""
    skew: float = 0.9
    """Exponent of Zipf's law: 0 makes all equally popular."""


@dataclass(slots=True)
class Conversation:
    """What was said so far."""

    user: str
    token_ids: list[int]
    num_left: int


class Chat:
    """Conversations that begin with one of few system prompts and grow turn by turn."""

    def __init__(self, chance: Random, settings: ChatSettings) -> None:
        self._chance, self._settings = chance, settings
        self._systems = [
            _tokens(chance, settings.system_tokens) for _ in range(settings.system_prompts)
        ]
        self._numbers = itertools.count()

    def begin(self) -> Conversation:
        """Return a conversation of which nothing was said yet."""
        system = self._chance.choice(self._systems)
        turns = self._chance.randint(*self._settings.turns)
        return Conversation(f"chat-{next(self._numbers)}", list(system), turns)

    def ask(self, conversation: Conversation) -> Ask:
        """Say the next turn; the answer is part of the conversation from then on."""
        settings = self._settings
        question = _tokens(self._chance, self._chance.randint(*settings.question_tokens))
        answer = _tokens(self._chance, self._chance.randint(*settings.answer_tokens))
        prompt = [*conversation.token_ids, *question]
        conversation.token_ids = [*prompt, *answer]
        conversation.num_left -= 1
        return Ask(prompt, answer, conversation.user)

    def think_s(self) -> float:
        """Draw the seconds until a user says more."""
        return self._chance.expovariate(1 / self._settings.think_s)


class Documents:
    """Independent questions, each behind one of the documents."""

    def __init__(self, chance: Random, settings: DocumentSettings) -> None:
        self._chance, self._settings = chance, settings
        self._documents = [
            _tokens(chance, chance.randint(*settings.document_tokens))
            for _ in range(settings.num_documents)
        ]
        self._weights = [1 / (rank + 1) ** settings.skew for rank in range(settings.num_documents)]
        self._numbers = itertools.count()

    def ask(self) -> Ask:
        """Ask something about a document."""
        settings, chance = self._settings, self._chance
        (document,) = chance.choices(self._documents, self._weights)
        question = _tokens(chance, chance.randint(*settings.question_tokens))
        answer = _tokens(chance, chance.randint(*settings.answer_tokens))
        return Ask([*document, *question], answer, f"reader-{next(self._numbers)}")

    def gap_s(self) -> float:
        """Draw the seconds until the next question of anybody."""
        return self._chance.expovariate(self._settings.asks_s)


def _tokens(chance: Random, count: int) -> list[int]:
    return chance.choices(range(VOCABULARY), k=count)
