"""Read the text of a `game.tw-pddl` file: which rules it uses, its facts and its goal.

Every game file repeats the rules (a PDDL domain) and the sentences (a grammar) of ALFWorld. Two
versions of them exist, and engine.py implements both. A file with any other rules or sentences is
refused; of the grammar only the task is read. Nothing in a file is ever evaluated as code.
"""

import hashlib
import json
import re
from collections import deque
from functools import lru_cache

DOMAINS = {  # SHA-1 of the PDDL domain -> the receptacle types at which objects are cleaned
    "0efb2ee66134ce3941f539d8d47a7b82e14bd2e6": ("sinktype", "sinkbasintype"),  # published games
    "f6b34d1678ff904f31b5ba33c065aa9c6e2e8bf5": ("sinkbasintype",),  # the alfworld 0.4.2 package
}
GRAMMARS = (  # SHA-1 of the grammar without the task
    "bc79a7414455a5916576efff17f4e912f32edecb",  # published games
    "dcb7088767f67c99c4674b3c1f1ef04a800dd60d",  # the alfworld 0.4.2 package
)
OLDER = ("; games of older releases say `put X in/on Y`: fetch those of 0.4 by "
         "`python -m fast_alfworld download`")
# The task sentence; no character is allowed that has a meaning in the grammar.
TASK = re.compile(r'"Your task is to: ([\w ,.!?\'()/-]+)"')

GOALS = {  # the predicates of the goal, in order -> task type
    "inreceptacle objecttype receptacletype": "pick_and_place_simple",
    "objecttype toggleable istoggled receptacleatlocation atlocation inreceptacle objecttype holds":
        "look_at_obj_in_light",
    "cleanable objecttype receptacletype isclean inreceptacle": "pick_clean_then_place_in_recep",
    "heatable objecttype receptacletype ishot inreceptacle": "pick_heat_then_place_in_recep",
    "coolable objecttype receptacletype iscool inreceptacle": "pick_cool_then_place_in_recep",
    "objecttype receptacletype inreceptacle = objecttype receptacletype inreceptacle":
        "pick_two_obj_and_place",
}
TASK_TYPES = tuple(GOALS.values())

# The predicates allowed in (:init …) and their number of arguments. In no game is anything held,
# open, switched on, sliced, hot or clean at the start.
ARITY = dict.fromkeys(("(pickupable", "(cleanable", "(heatable", "(coolable", "(toggleable",
                       "(sliceable", "(openable", "(isreceptacleobject", "(iscool"), 1)
ARITY |= dict.fromkeys(("(objecttype", "(receptacletype", "(objectatlocation",
                        "(receptacleatlocation", "(atlocation", "(inreceptacle",
                        "(inreceptacleobject", "(cancontain"), 2)


class DataError(ValueError):
    """Games that were asked for are missing or cannot be made; the message is one line."""


class GameError(ValueError):
    """A game file cannot be played; the message is one line and names the file."""


class UnsolvableError(GameError):
    """A game that is marked as one that nobody can win."""


# The two layouts decoded last: (bytes before the task, bytes from there to the problem, decoded
# rules, grammar before the task, grammar after the task).
_layouts = deque(maxlen=2)


def decode(raw):
    """json.loads(raw) for the bytes of a game file, but a third faster.

    The rules are the same in all files, so they are decoded once and compared as bytes afterwards.
    Raises ValueError or RecursionError as json.loads does.
    """
    for before, after, rules, opening, closing in _layouts:
        if raw.startswith(before):
            start, end = len(before), raw.find(b"\\", len(before))
            if raw.startswith(after, end):
                grammar = opening + raw[start:end].decode() + closing
                return {**rules, "grammar": grammar,
                        **json.loads(b"{" + raw[end + len(after):])}
    data = json.loads(raw)
    before, mark, rest = raw.partition(b"Your task is to: ")
    task, quote, rest = rest.partition(b"\\")
    after = rest.partition(b'"pddl_problem"')[0]
    try:
        rules = json.loads(before + mark + task + quote + after.rstrip(b", ") + b"}")
        opening, closing = rules["grammar"].split(task.decode())
        _layouts.appendleft((before + mark, quote + after, rules, opening, closing))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # the file is laid out differently; json.loads has read it all the same
    return data


def check(data):
    """Check the decoded JSON -> (receptacle types that clean, task, PDDL problem, walkthrough).

    Raises GameError where the engine cannot play the game.
    """
    if not isinstance(data, dict):
        raise GameError("not a JSON object")
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameError(f"its {key} is {'not a text' if key in data else 'missing'}")
    walkthrough = data.get("walkthrough") or []
    if not isinstance(walkthrough, list) or not all([isinstance(c, str) for c in walkthrough]):
        raise GameError("its walkthrough is not a list of texts")
    if data.get("solvable") is False:
        raise UnsolvableError("it is marked as not solvable")
    clean_at = DOMAINS.get(_sha1(data["pddl_domain"]))
    if clean_at is None:
        raise GameError(f"its pddl_domain is not that of alfworld 0.4{OLDER}")
    grammar = data["grammar"]
    task = TASK.search(grammar)
    if task is None:
        raise GameError("its grammar names no task")
    if _sha1(grammar[:task.start(1)] + grammar[task.end(1):]) not in GRAMMARS:
        raise GameError(f"its grammar is not that of alfworld 0.4{OLDER}")
    return clean_at, task[1], data["pddl_problem"], walkthrough


@lru_cache(maxsize=64)  # thousands of games share a few distinct texts
def _sha1(text):
    return hashlib.sha1(text.encode(errors="replace")).hexdigest()


def read_facts(text):
    """"(openable a) (atlocation b c)" -> {"(openable": [["a"]], "(atlocation": [["b"], ["c"]]}.

    Each predicate of ARITY has one list (column) for each of its arguments. Raises GameError.
    """
    facts = {predicate: [[] for _ in range(arity)] for predicate, arity in ARITY.items()}
    words = text.replace(")", " ").split()
    words.append("")
    start = 0
    while words[start]:
        predicate, columns = words[start], facts.get(words[start])
        if columns is None:
            raise GameError(f"its (:init …) states {predicate[:40]!r}, which no game does")
        step = 1 + len(columns)
        end = start + step
        while end < len(words) and words[end] == predicate:  # a run of facts of the same predicate
            end += step
        if end >= len(words):
            raise GameError(f"its (:init …) breaks off in a fact of {predicate!r}")
        columns[0] += words[start + 1:end:step]
        if step == 3:
            columns[1] += words[start + 2:end:step]
        start = end
    return facts


@lru_cache(maxsize=1024)
def read_can_contain(text):
    """"(cancontain desktype mugtype) …" -> {"desktype": {"mugtype"}}. Raises GameError."""
    facts, accepted = read_facts(text), {}
    for receptacle_type, object_type in zip(*facts.pop("(cancontain")):
        accepted.setdefault(receptacle_type, set()).add(object_type)
    if any(columns[0] for columns in facts.values()):
        raise GameError("other facts stand between those of canContain")
    return accepted


def one_each(facts, predicate):
    """{first argument: second argument}. Raises GameError where a first argument has two."""
    firsts, seconds = facts[predicate]
    found = dict(zip(firsts, seconds))
    if len(found) < len(firsts):
        raise GameError(f"its (:init …) states {predicate[1:]} twice of one thing")
    return found


@lru_cache(maxsize=1024)
def read_goal(text):
    """"(:goal …)" -> (task type, type of the wanted objects, type of the receptacle or lamp).

    Raises GameError for a goal that is none of ALFWorld's six.
    """
    form = re.sub(r"\b(?:and|exists|not) ?", "", " ".join(re.findall(r"\((\w+|=) \?", text)))
    types = re.findall(r" (\w+type)\)", text)
    if form not in GOALS or len(types) < 2 or types != types[:2] * (len(types) // 2):
        raise GameError(f"its goal is none of ALFWorld's six ({form[:200] or 'empty'})")
    lamp_first = GOALS[form] == "look_at_obj_in_light"
    object_type, other_type = types[1::-1] if lamp_first else types[:2]
    return GOALS[form], object_type, other_type
