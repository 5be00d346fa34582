"""Records that are conversations: what a record says, and the one text that its turns are in the steps before the template.

That text is what all turns say, joined by blank lines; beside it stands whose is how much of it, so that filters, decontamination and
near-duplicates see what was said and no markup, and nothing is held twice. A system turn that many conversations share makes none of them
alike or good: filters and the signatures of near-duplicates pass it over.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from distlm.spec.curate import Clean
from distlm.spec.prepare import ROLES, Conversations
from distlm.text.clean import Cleaned, clean

SEPARATOR = "\n\n"
SYSTEM, USER, ANSWERS = ROLES
LONGER = "longer_than_window"
"""The reason of a conversation, or a part of one, that no window holds."""
BESIDE = ("tools", "functions")
"""Fields of a record that say what its answers may call: they would be lost."""
CHOSEN, REJECTED = "+", "-"
"""Before the role of a turn that belongs to one of two answers: a preference is the turns of its prompt, of the better and of the worse."""
Turns = Sequence[tuple[str, str]]
"""(role, what it says) of each message, in order."""


class Refused(ValueError):
    """A conversation that cannot be taken."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail[:200]


def turns_of(values: Sequence[Any], rules: Conversations) -> Turns:
    """What the fields `rules.keys` of a record say. Raises Refused."""
    if rules.pairs:
        return _preference(values, rules)
    if rules.prompt_key:
        messages: Any = [{"role": role, "content": value} for role, value in zip((USER, ANSWERS), values, strict=True)]
        role_key, content_key = "role", "content"
    else:
        (messages,), role_key, content_key = values, rules.role_key, rules.content_key
    return _messages(messages, rules.messages_key, rules, role_key, content_key)


def _messages(messages: Any, name: str, rules: Conversations, role_key: str, content_key: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise Refused("messages_no_list", f"{name!r} is a {type(messages).__name__}")
    if not messages:
        raise Refused("empty_conversation", f"{name!r} has no message")
    known = {role: role for role in ROLES} | rules.roles
    taken = {role_key, content_key, *rules.ignore_keys}
    return [_turn(f"message {i}", message, role_key, content_key, known, taken) for i, message in enumerate(messages)]


def _turn(what: str, message: Any, role_key: str, content_key: str, known: dict[str, str], taken: set[str]) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise Refused("message_no_object", f"{what} is a {type(message).__name__}")
    role, content = message.get(role_key), message.get(content_key)
    if not isinstance(role, str) or role not in known:
        raise Refused("unknown_role", f"{what} has the {role_key} {role!r}, which is none of {', '.join(known)}")
    if calls := [key for key in ("tool_calls", "function_call") if message.get(key)]:
        raise Refused("tool_calls", f"{what} has {calls[0]}, which would be lost")
    if lost := [key for key, value in message.items() if key not in taken and value is not None and value not in ("", [], {})]:
        raise Refused("unknown_key", f"{what} has {lost[0]}, which would be lost; conversations.ignore_keys names what may be")
    if not isinstance(content, str):
        raise Refused("content_no_text", f"{what}: {content_key} is a {type(content).__name__}")
    return known[role], content


def _preference(values: Sequence[Any], rules: Conversations) -> Turns:
    """A prompt, the better and the worse answer to it. Each is a text or a list of messages; answers may begin with the prompt's, and
    without one with what both have in common before their last message."""
    given = [[(role, value)] if isinstance(value, str) else _messages(value, key, rules, rules.role_key, rules.content_key)
             for key, value, role in zip(rules.keys, values, (USER, ANSWERS, ANSWERS)[-len(values):], strict=True)]
    *prompts, chosen, rejected = given
    shared = next((i for i, (a, b) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if a != b),
                  min(len(chosen), len(rejected)) - 1)
    prompt = prompts[0] if prompts else chosen[:shared]
    first = [len(prompt) if answer[:len(prompt)] == prompt else 0 for answer in (chosen, rejected)]
    return checked_preference([*prompt, *((CHOSEN + role, content) for role, content in chosen[first[0]:]),
                               *((REJECTED + role, content) for role, content in rejected[first[1]:])])


def checked_preference(turns: Turns) -> Turns:
    """The turns of a preference. Raises Refused where its answers are equal, or one says nothing or is none."""
    prompt, *answers = sides(turns)
    if not prompt:
        raise Refused("no_prompt", "the answers begin with no message that both have")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer or any(role != ANSWERS and role != USER for role, _ in answer) or answer[-1][0] != ANSWERS:
            raise Refused("no_answer", f"what is {name} is no answer to the prompt")
        if any(is_empty_answer(*turn) for turn in answer):
            raise Refused("empty_answer", f"the {name} answer says nothing")
    if answers[0] == answers[1]:
        raise Refused("equal_answers", "the chosen answer is the rejected one")
    return turns


def sides(turns: Turns) -> tuple[Turns, Turns, Turns]:
    """(prompt, better answer, worse answer) of a preference's turns."""
    chosen, rejected = ([(role[1:], content) for role, content in turns if role[0] == mark] for mark in (CHOSEN, REJECTED))
    return [turn for turn in turns if turn[0][0] not in (CHOSEN, REJECTED)], chosen, rejected


def joined(turns: Turns) -> tuple[str, str]:
    """(the text, whose is how much of it as JSON: [[role, characters], ...])."""
    return SEPARATOR.join(content for _, content in turns), json.dumps([[role, len(content)] for role, content in turns])


def clean_turns(turns: Turns, rules: Clean) -> tuple[Cleaned, str]:
    """Apply the rules to what each turn says: (all turns as one text, whose is how much of it)."""
    each = [clean(content, rules) for _, content in turns]
    text, sizes = joined([(role, one.text) for (role, _), one in zip(turns, each, strict=True)])
    taken, redactions = Counter[str](), Counter[str]()
    for one in each:
        taken.update(one.taken)                            # which adds, and keeps what is negative
        redactions.update(one.redactions)
    said = sum(len(one.text) for one in each)
    return Cleaned(text, len(text.encode()), dict(taken), "too_short" if said < rules.min_chars else "", dict(redactions)), sizes


def parted(text: str, turns: str) -> Turns:
    """The turns that `joined` has joined."""
    found, begin = [], 0
    for role, size in json.loads(turns):
        found.append((role, text[begin:begin + size]))
        begin += size + len(SEPARATOR)
    return found


def without_system(text: str, turns: str) -> str:
    """What `joined` has joined without its system turns, which many conversations share; a text that is none as it is."""
    if f'"{SYSTEM}"' not in turns:
        return text
    return SEPARATOR.join(content for role, content in parted(text, turns) if role != SYSTEM)


def is_empty_answer(role: str, content: str) -> bool:
    """Whether the turn is an answer that says nothing: it must not teach to say nothing."""
    return role == ANSWERS and not content.strip()


def divided(turns: Turns, fits: Callable[[Turns], bool]) -> list[Turns]:
    """The parts of a conversation, cut behind answers: each as long as fits, but one exchange at least, which may not fit. The system
    turns at the beginning stand before each part. `fits` is asked about twice the logarithm of a part's exchanges, and about no more
    than two parts' turns at a time."""
    first = next((i for i, (role, _) in enumerate(turns) if role != SYSTEM), len(turns))
    head, rest = list(turns[:first]), list(turns[first:])
    ends = [i for i in range(1, len(rest)) if rest[i - 1][0] == ANSWERS != rest[i][0]] + [len(rest)]
    parts, begin = list[Turns](), 0
    while ends:
        low, high = 1, 2                                   # so many exchanges are taken, so many are not known to fit
        while high <= len(ends) and fits(head + rest[begin:ends[high - 1]]):
            low, high = high, 2 * high
        high = min(high, len(ends) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(head + rest[begin:ends[middle - 1]]) else (low, middle)
        parts.append(head + rest[begin:ends[low - 1]])
        begin, ends = ends[low - 1], ends[low:]
    return parts
