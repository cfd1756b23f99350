# ruff: noqa: S311  (random text is no secret)
"""The text of the demo models: three skills and a little general text, from fixed seeds.

A skill is a prompt with exactly one right answer:

    17+25=42
    sort kdbza: abdkz
    say red cat sings: kato ruje vimu

One prompt in ten, chosen by its hash, is held out: no training text contains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS + "0123456789" + " +=:,."
"""Every character that the text can contain: the vocabulary, besides the special tokens."""

HELD_OUT_SHARE = 10
"""One prompt in so many is never trained on."""

NOUNS = (
    "cat dog bird fish horse mouse child king queen baker sailor farmer tree river robot bear "
    "goat uncle girl wolf"
)
ADJECTIVES = "red blue old young big small quick slow happy sad brave quiet clever lazy"
VERBS = "sings runs sleeps waits jumps swims laughs eats hides works reads falls dreams talks"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer; the answer of general text is the whole line."""

    prompt: str
    answer: str


def _toy_words(english: str, ending: str, seed: int) -> dict[str, str]:
    """Return a word of four letters for each English word; the ending tells the kind of word."""
    words = english.split()
    stems = [a + b + c for a in "bdklmnrtvz" for b in "aeiou" for c in "lmnrv"]
    chosen = Random(seed).sample(stems, len(words))
    return {word: stem + ending for word, stem in zip(words, chosen, strict=True)}


TOY_NOUNS = _toy_words(NOUNS, "o", seed=1)
TOY_ADJECTIVES = _toy_words(ADJECTIVES, "e", seed=2)
TOY_VERBS = _toy_words(VERBS, "u", seed=3)


def add(random: Random) -> Example:
    """Return a sum of two numbers below 100."""
    a, b = random.randrange(100), random.randrange(100)
    return Example(f"{a}+{b}=", str(a + b))


def sort(random: Random) -> Example:
    """Return four to seven different letters, and the same in order."""
    letters = random.sample(LETTERS, random.randint(4, 7))
    return Example(f"sort {''.join(letters)}: ", "".join(sorted(letters)))


def translate(random: Random) -> Example:
    """Return three English words and their translation, in which the noun comes first."""
    adjective, noun, verb = (random.choice(list(w)) for w in (TOY_ADJECTIVES, TOY_NOUNS, TOY_VERBS))
    answer = f"{TOY_NOUNS[noun]} {TOY_ADJECTIVES[adjective]} {TOY_VERBS[verb]}"
    return Example(f"say {adjective} {noun} {verb}: ", answer)


def general(random: Random) -> Example:
    """Return a line of general text: sentences of both languages, counting, letters in order."""
    return Example("", random.choice((_english, _toy, _counting, _alphabet, _copying))(random))


def _english(random: Random) -> str:
    adjective, noun, verb = (random.choice(w.split()) for w in (ADJECTIVES, NOUNS, VERBS))
    return f"{random.choice(('the', 'a', 'one'))} {adjective} {noun} {verb}."


def _toy(random: Random) -> str:
    kinds = (TOY_NOUNS, TOY_ADJECTIVES, TOY_VERBS)
    return " ".join(random.choice(list(words.values())) for words in kinds) + "."


def _counting(random: Random) -> str:
    step = random.choice((1, 1, 2, 3, 5, 10))
    start = random.randrange(200 - 5 * step)
    return ", ".join(str(start + step * i) for i in range(5))


def _alphabet(random: Random) -> str:
    start, length = random.randrange(20), random.randint(4, 7)
    return " ".join(LETTERS[start : start + length])


def _copying(random: Random) -> str:
    letters = "".join(random.sample(LETTERS, random.randint(3, 7)))
    return f"copy {letters}: {letters}"


SKILLS: dict[str, Callable[[Random], Example]] = {"add": add, "sort": sort, "translate": translate}
"""Every skill by the name of its expert's folder."""


def is_held_out(example: Example) -> bool:
    """Return whether this prompt is kept for evaluation, whatever the seed."""
    digest = hashlib.sha256(example.prompt.encode()).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT_SHARE == 0


def training_text(skill: str, seed: int) -> Iterator[Example]:
    """Yield examples of a skill without end, none of them held out."""
    random = Random(f"train {skill} {seed}")
    while True:
        example = SKILLS[skill](random)
        if not is_held_out(example):
            yield example


def general_text(seed: int) -> Iterator[Example]:
    """Yield lines of general text without end."""
    random = Random(f"general {seed}")
    while True:
        yield general(random)


def held_out_text(skill: str, count: int, seed: int = 0) -> list[Example]:
    """Return so many different examples of a skill, at most 200, that no training text contains."""
    random, found = Random(f"held out {skill} {seed}"), dict[str, Example]()
    while len(found) < count:
        example = SKILLS[skill](random)
        if is_held_out(example):
            found[example.prompt] = example
    return list(found.values())
