"""Built-in procedural tasks: short problems with one verifiable answer, for small models and for tests.

`data.load_rows("task:arithmetic", split="train", kwargs={"size": 256})` reads them; `TASKS` at the end lists the names.
Rows are in verl's schema, the same for the same seed, and no problem of one split is in the other: which split a problem
belongs to is a hash of the problem itself, so it holds for any two seeds and sizes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

TEST_SHARE = 0.2  # of a task's distinct problems


def verl_row(
    *,
    data_source: str,
    content: str,
    ground_truth: str,
    ability: str,
    split: str,
    index: int,
    question: str,
    answer: str,
    **extra: Any,
) -> dict[str, Any]:
    """One row of verl's schema; `content` is what the user message says, `question` and `answer` are the raw fields."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer, **extra},
    }


def arithmetic(
    split: str,
    size: int,
    seed: int,
    *,
    digits: int = 1,
    operators: str = "+",
    num_terms: int = 2,
    template: str = "What is {expression}? Answer with the number only.",
) -> list[dict[str, Any]]:
    """Sums, differences and products of `num_terms` whole numbers of up to `digits` digits, products binding tighter.

    3 + 4 and 4 + 3 count as one problem when the splits are drawn.
    """
    _require(digits >= 1 and num_terms >= 2, "arithmetic", "digits must be 1 or more and num_terms 2 or more")
    _require(
        bool(operators) and set(operators) <= set("+-*"), "arithmetic", f"operators {operators!r} must be of + - *"
    )
    operators = "".join(dict.fromkeys(operators))  # a repeated operator would make the same problem twice

    def make(index: int) -> tuple[str, str, object]:
        terms, signs = [], []
        for _ in range(num_terms):
            index, term = divmod(index, 10**digits)
            terms.append(term)
        for _ in range(num_terms - 1):
            index, sign = divmod(index, len(operators))
            signs.append(operators[sign])
        expression = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
        commutes = set(signs) in ({"+"}, {"*"})
        key = (signs[0], sorted(terms)) if commutes else expression
        return template.format(expression=expression), str(_evaluate(terms, signs)), key

    num_problems = 10 ** (digits * num_terms) * len(operators) ** (num_terms - 1)
    return _rows("arithmetic", "math", split, size, seed, num_problems, make)


def largest_number(
    split: str,
    size: int,
    seed: int,
    *,
    count: int = 3,
    digits: int = 2,
    template: str = "Which of these numbers is the largest: {numbers}? Answer with the number only.",
) -> list[dict[str, Any]]:
    """The largest of `count` different whole numbers of up to `digits` digits; the order of the numbers does not count."""
    _require(2 <= count <= 10**digits, "largest_number", f"count {count} must be between 2 and 10**digits")

    def make(index: int) -> tuple[str, str, object]:
        numbers = _arrangement(index, count, 10**digits)
        return template.format(numbers=", ".join(map(str, numbers))), str(max(numbers)), sorted(numbers)

    return _rows("largest_number", "math", split, size, seed, _num_arrangements(count, 10**digits), make)


def sort_numbers(
    split: str,
    size: int,
    seed: int,
    *,
    count: int = 3,
    digits: int = 1,
    template: str = "Sort from smallest to largest: {numbers}. Answer with the sorted numbers only, separated by commas.",
) -> list[dict[str, Any]]:
    """`count` different whole numbers of up to `digits` digits in rising order; the truth is written as `1, 5, 9`."""
    _require(2 <= count <= 10**digits, "sort_numbers", f"count {count} must be between 2 and 10**digits")

    def make(index: int) -> tuple[str, str, object]:
        numbers = _arrangement(index, count, 10**digits)
        answer = ", ".join(map(str, sorted(numbers)))
        return template.format(numbers=", ".join(map(str, numbers))), answer, sorted(numbers)

    return _rows("sort_numbers", "math", split, size, seed, _num_arrangements(count, 10**digits), make)


def last_letter(
    split: str,
    size: int,
    seed: int,
    *,
    num_words: int = 2,
    template: str = "Take the last letter of each of these words and join them: {words}. Answer with the letters only.",
) -> list[dict[str, Any]]:
    """The last letters of `num_words` different words, joined (the symbolic task of arXiv:2201.11903, section 5)."""
    _require(1 <= num_words <= 10, "last_letter", "num_words must be between 1 and 10")

    def make(index: int) -> tuple[str, str, object]:
        words = [WORDS[i] for i in _arrangement(index, num_words, len(WORDS))]
        return template.format(words=" ".join(words)), "".join(word[-1] for word in words), sorted(words)

    return _rows("last_letter", "symbolic", split, size, seed, _num_arrangements(num_words, len(WORDS)), make)


def count_letters(
    split: str,
    size: int,
    seed: int,
    *,
    template: str = 'How many times is the letter "{letter}" in the word "{word}"? Answer with the number only.',
) -> list[dict[str, Any]]:
    """How often a letter of a word occurs in it: once or more."""
    problems = [(word, letter) for word in WORDS for letter in sorted(set(word))]

    def make(index: int) -> tuple[str, str, object]:
        word, letter = problems[index]
        return template.format(letter=letter, word=word), str(word.count(letter)), (word, letter)

    return _rows("count_letters", "symbolic", split, size, seed, len(problems), make)


def _rows(
    task: str,
    ability: str,
    split: str,
    size: int,
    seed: int,
    num_problems: int,
    make: Callable[[int], tuple[str, str, object]],
) -> list[dict[str, Any]]:
    """`size` different problems of the split, drawn from `range(num_problems)` in an order given by the seed.

    `make(i)` returns question, answer, and a key that is the same for all problems that must stay in one split.
    """
    _require(split in ("train", "test"), task, f"split {split!r} must be train or test")
    _require(size >= 1, task, f"size {size} must be 1 or more")
    _require(num_problems < 2**62, task, "these settings make more than 2**62 problems; lower the numbers")
    # The smaller split holds a fifth of the problems, so 20 draws a row find enough of them when there are enough.
    num_draws = min(num_problems, 20 * size + 1000)
    rows: list[dict[str, Any]] = []
    for problem in random.Random(f"{task}/{split}/{seed}").sample(range(num_problems), num_draws):
        try:
            question, answer, key = make(problem)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"task:{task} cannot fill the template: {error!r}; see its default for the names"
            ) from None
        if _split_of(task, key) == split:
            index = len(rows)
            rows.append(
                verl_row(
                    data_source=task,
                    content=question,
                    ground_truth=answer,
                    ability=ability,
                    split=split,
                    index=index,
                    question=question,
                    answer=answer,
                )
            )
            if len(rows) == size:
                return rows
    raise ValueError(
        f"task:{task} has only {len(rows)} different {split} problems with these settings, but size is {size}: "
        f"lower size or make the task larger (more digits, terms, operators, words)"
    )


def _split_of(task: str, key: object) -> str:
    """The split that a problem belongs to, from a hash of the problem alone."""
    digest = hashlib.sha256(f"{task}:{key!r}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


def _evaluate(terms: list[int], signs: list[str]) -> int:
    """The value of `terms[0] signs[0] terms[1] ...`, products first."""
    total, product = 0, terms[0]
    for sign, term in zip(signs, terms[1:], strict=True):
        if sign == "*":
            product *= term
        else:
            total, product = total + product, term if sign == "+" else -term
    return total + product


def _num_arrangements(count: int, num_values: int) -> int:
    """How many ordered choices of `count` different values there are."""
    total = 1
    for taken in range(count):
        total *= num_values - taken
    return total


def _arrangement(index: int, count: int, num_values: int) -> list[int]:
    """The `index`-th ordered choice of `count` different values out of `range(num_values)`."""
    chosen: list[int] = []
    for taken in range(count):
        index, value = divmod(index, num_values - taken)
        for earlier in sorted(chosen):  # count only the values that are still free
            value += value >= earlier
        chosen.append(value)
    return chosen


def _require(holds: bool, task: str, message: str) -> None:
    if not holds:
        raise ValueError(f"task:{task}: {message}")


WORD_LIST = """
    apple arrow autumn bag ball banana bank basket beach bear bell bird blanket boat bone book bottle bowl box branch bread
    bridge brother brush bus butter button cabin cake camel camera candle car carpet carrot castle cat chair cheese cherry
    church circle city clock cloud coat coffee coin corn cotton cow crown cup curtain dance desert desk dinner doctor dog
    dollar door dream dress drum duck eagle ear earth egg elephant engine evening eye farm feather field finger fire fish
    flag floor flower forest fork fox friend frog garden gate ghost giraffe glass glove gold goose grape grass guitar hair
    hammer hand harbor hat heart hill honey horse hotel house ice island jacket jelly jewel juice kettle key king kitchen
    kite knife ladder lake lamp leaf lemon letter library lion lock market meadow melon milk mirror money monkey moon
    morning mountain mouse music needle nest night nose ocean office onion orange oven owl paint palace paper parrot
    peach pearl pencil penguin pepper piano picture pillow pilot planet plate pocket potato prince pumpkin queen rabbit
    radio rain ribbon ring river road robot rocket roof room rope rose salt sand school scissors shadow sheep shell ship
    shirt shoe silver sister snow soap sock soup spider spoon spring square star station stone storm story street
    sugar summer sun table tea temple tiger tomato tower town train tree turtle umbrella uncle valley village violin
    wagon wall water wheel whistle wind window wing winter wolf wood yard zebra
"""
WORDS = tuple(WORD_LIST.split())

TASKS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "arithmetic": arithmetic,
    "largest_number": largest_number,
    "sort_numbers": sort_numbers,
    "last_letter": last_letter,
    "count_letters": count_letters,
}
