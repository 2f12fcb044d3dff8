"""The stories of the bundled world: their state is kept, and told again at the end.

A story is a function of a draw and a language. It says its sentences and returns what they have decided, as a list of
`State`s; `restate` then ends the text with one of these. What they say costs no information, so a model that reads
well can know the last sentence almost in full.

    story_where     two people go about, and a thing is carried, left and picked up
    story_give      two or three people hand two things on
    story_count     two people get more of something, or lose some

Read next: facts.py, translations.py and arithmetic.py, the texts that are no stories, in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.world.draw import Draw, Table
from data.world.phrases import GAP, Pair, Slots, amount, any_place, coloured, digits, phrase, phrases, tell
from data.world.words import DAYS, EN, HELD_PAIRS, HOURS, PLACES, WEATHERS, ZH, Person, Thing, Word


class State(NamedTuple):
    """Something that a story has decided: a key of `STATES`, and the slots of its sentence."""

    kind: str
    slots: Slots


def named(state: State) -> dict[str, str | int]:
    """A state as JSON: its kind, and the English names of what it is about."""
    names: dict[str, str | int] = {"kind": state.kind}
    for slot, value in state.slots.items():
        if slot == "amount":
            names |= {"thing": value.thing.en, "number": value.number}
        else:
            names[slot] = value.en
    return names


# ---- how stories begin and end, and what is between their sentences ------------------------------------------------

IT_WAS = phrase("那是一个{weather}的{hour}。 | It was a {weather} {hour}.")
ON_DAY = phrase("{day}{hour}， | On {day} {hour}")
OPENINGS = Table((0.5, None), (0.25, IT_WAS), (0.25, ON_DAY))
CONNECTORS = Table(
    (0.55, ("", "")),
    (0.15, ("然后", "Then ")),
    (0.15, ("后来", "Later ")),
    (0.15, ("接着", "Next ")),
)
ENDINGS = Table(
    (0.7, ("现在", "Now ")),
    (0.15, ("所以现在", "So now ")),
    (0.15, ("这时候", "At this point ")),
)
STATES = {
    "item": phrase("{thing}在{place}里。 | the {thing} is in the {place}."),
    "person": phrase("{who}在{place}里。 | {who} is in the {place}."),
    "holder": phrase("{thing}在{who}手里。 | {who} has the {thing}."),
    "count": phrase("{who}有{amount}。 | {who} has {amount}."),
}


def opening(draw: Draw, lang: int) -> None:
    """Say when the story happens, or nothing."""
    wording = draw.choose(OPENINGS)
    if wording is None:
        return
    slots = {
        "weather": lambda draw: draw.pick(WEATHERS),
        "hour": lambda draw: draw.pick(HOURS),
        "day": lambda draw: draw.pick(DAYS),
    }
    tell(draw, lang, wording, slots)
    draw.say(GAP[lang])


def begin_sentence(draw: Draw, lang: int, who: Person, last: Person | None) -> Pair:
    """Begin a sentence about `who`; returns how it names them: if the last one was about them, by pronoun perhaps."""
    draw.say(GAP[lang])
    connector = draw.choose(CONNECTORS)
    draw.say(connector[lang])
    if who is not last:
        return who
    pronoun = who.pronoun
    if not connector[EN]:  # the pronoun is the first word
        pronoun = (pronoun[ZH], pronoun[EN].capitalize())
    return draw.pick((who, pronoun))


def restate(draw: Draw, lang: int, states: list[State]) -> State:
    """End a story by telling one of the things that it has decided; returns which."""
    draw.say(GAP[lang])
    ending = draw.choose(ENDINGS)
    draw.say(ending[lang])
    state = draw.pick(states)
    tell(draw, lang, STATES[state.kind], state.slots)
    return state


# ---- where is it? --------------------------------------------------------------------------------------------------

IN = phrase("{who}在{place}里。 | {who} was in the {place}.")
IN_WITH = phrase("{who}在{place}里，手里拿着{something}。 | {who} was in the {place} with {something}.")
THERE = phrase("{place}里有{something}。 | In the {place} there was {something}.")
GO = phrases(
    "{who}去了{place}。 | {who} went to the {place}.",
    "{who}走到了{place}。 | {who} walked to the {place}.",
)
TAKE = phrases(
    "{who}把{thing}带到了{place}。 | {who} took the {thing} to the {place}.",
    "{who}把{thing}拿到了{place}。 | {who} carried the {thing} to the {place}.",
)
LEAVE = phrase(
    "{who}把{thing}留在{here}里，去了{place}。 | {who} left the {thing} in the {here} and went to the {place}."
)
FETCH = phrase("{who}到{place}里拿起了{thing}。 | {who} went to the {place} and picked up the {thing}.")
LIFT = phrase("{who}拿起了{thing}。 | {who} picked up the {thing}.")


@dataclass
class Scene:
    """Where everybody is, and the thing: with its holder, or in a place by itself."""

    place_of: dict[int, Word]  # by the index of a person
    thing: Thing
    holder: Person | None
    thing_place: Word | None  # None while somebody holds the thing


def story_where(draw: Draw, lang: int, moves: Sequence[int] = (2, 3, 4)) -> list[State]:
    """Two people go about, and a thing is carried along; returns where all are in the end.

    moves: how often somebody may do something
    """
    opening(draw, lang)

    # Somebody is in a place, perhaps with the thing; then somebody else is in a place.
    first = draw.person()
    holder = draw.pick((first, None))
    first_slots = {"who": first, "place": any_place, "something": coloured}
    tell(draw, lang, IN_WITH if holder else IN, first_slots)
    draw.say(GAP[lang])
    second = draw.person()
    second_slots = {"who": second, "place": any_place}
    tell(draw, lang, IN, second_slots)

    # If nobody has the thing, it is in a place by itself.
    thing_place = None
    thing_slots = first_slots
    if not holder:
        draw.say(GAP[lang])
        thing_slots = {"place": any_place, "something": coloured}
        tell(draw, lang, THERE, thing_slots)
        thing_place = thing_slots["place"]

    # They go about.
    place_of = {first.index: first_slots["place"], second.index: second_slots["place"]}
    scene = Scene(place_of, thing_slots["something"].thing, holder, thing_place)
    last = None
    for _ in range(draw.pick(moves)):
        who = draw.pick((first, second))
        subject = begin_sentence(draw, lang, who, last)
        move(draw, lang, scene, who, subject)
        last = who

    if scene.holder:
        scene.thing_place = scene.place_of[scene.holder.index]
    return [
        State("item", {"thing": scene.thing, "place": scene.thing_place}),
        State("person", {"who": first, "place": scene.place_of[first.index]}),
        State("person", {"who": second, "place": scene.place_of[second.index]}),
    ]


def move(draw: Draw, lang: int, scene: Scene, who: Person, subject: Pair) -> None:
    """One sentence, in which `who` goes somewhere, or carries, leaves or picks up the thing."""
    here = scene.place_of[who.index]
    slots = {
        "who": subject,
        "thing": scene.thing,
        "here": here,
        "place": lambda draw: draw.pick([place for place in PLACES if place is not here]),
    }

    # Which of the acts are possible depends on who has the thing.
    if who is scene.holder:
        act = draw.pick((*TAKE, LEAVE))
    elif scene.holder:
        act = draw.pick(GO)
    else:
        act = draw.pick((*GO, LIFT if scene.thing_place is here else FETCH))
    if act is LIFT or act is FETCH:
        slots["place"] = scene.thing_place
    tell(draw, lang, act, slots)

    # What the act has changed.
    scene.place_of[who.index] = slots["place"]
    if act is LEAVE:
        scene.holder = None
        scene.thing_place = here
    elif act is LIFT or act is FETCH:
        scene.holder = who
        scene.thing_place = None


# ---- who has it? ---------------------------------------------------------------------------------------------------

EACH_HAD = phrase(
    "{who}有{something}，{other}有{something_else}。 | {who} had {something}, and {other} had {something_else}."
)
NOTHING = phrase("{who}什么也没有。 | {who} had nothing.")
GIVE = phrases(
    "{who}把{thing}给了{other}。 | {who} gave the {thing} to {other}.",
    "{who}把{thing}交给了{other}。 | {who} handed the {thing} to {other}.",
)


def story_give(draw: Draw, lang: int) -> list[State]:
    """Two or three people hand two things on; returns who has each in the end."""
    opening(draw, lang)

    # Each of two people has a thing; perhaps a third one has nothing.
    slots = {
        "who": draw.person(),
        "something": coloured,
        "other": Draw.person,
        "something_else": lambda draw: coloured(draw, other_than=slots["something"].thing),
    }
    tell(draw, lang, EACH_HAD, slots)
    people = [slots["who"], slots["other"]]
    things = [slots["something"].thing, slots["something_else"].thing]
    if draw.pick((True, False)):
        draw.say(GAP[lang])
        third = draw.person()
        people.append(third)
        tell(draw, lang, NOTHING, {"who": third})

    # The things go from hand to hand.
    holders = people[:2]  # holders[i] has things[i]
    last = None
    for _ in range(draw.pick((1, 2, 3))):
        i = draw.pick((0, 1))
        giver = holders[i]
        receivers = [person for person in people if person is not giver]
        subject = begin_sentence(draw, lang, giver, last)
        holders[i] = give(draw, lang, subject, things[i], receivers)
        last = giver

    return [State("holder", {"thing": thing, "who": who}) for thing, who in zip(things, holders, strict=True)]


def give(draw: Draw, lang: int, subject: Pair, thing: Thing, receivers: list[Person]) -> Person:
    """One sentence, in which a thing is handed on; returns to whom."""
    wording = draw.pick(GIVE)
    slots = {"who": subject, "thing": thing, "other": lambda draw: draw.pick(receivers)}
    tell(draw, lang, wording, slots)
    return slots["other"]


# ---- how many? -----------------------------------------------------------------------------------------------------

GAIN = phrases(
    "{who}又买了{amount}。 | {who} bought {number} more {noun}.",
    "{who}又找到了{amount}。 | {who} found {number} more {noun}.",
)
DROP = phrases(
    "{who}丢了{amount}。 | {who} lost {amount}.",
    "{who}卖了{amount}。 | {who} sold {amount}.",
)
EAT = phrase("{who}吃了{amount}。 | {who} ate {amount}.")
HAND = phrase("{who}给了{other}{amount}。 | {who} gave {other} {amount}.")

FIRST_COUNTS = range(3, 13)  # how many somebody has at first
# ADDABLE[n]: what may be added to n, that is, what is not held out beside n. REMOVABLE[n]: what may be taken from n.
ADDABLE = [[change for change in range(1, 10) if (n, change) not in HELD_PAIRS] for n in range(100)]
REMOVABLE = [[change for change in ADDABLE[n] if change < n] for n in range(100)]


def story_count(draw: Draw, lang: int) -> list[State]:
    """Two people have some things, and one or both get more or fewer; returns how many they have in the end."""
    opening(draw, lang)

    # Each has a number of things, of one kind or of two.
    slots = {
        "who": draw.person(),
        "something": lambda draw: amount(draw.word("thing"), draw.pick(FIRST_COUNTS)),
        "other": Draw.person,
        "something_else": lambda draw: same_or_other(draw, slots["something"].thing),
    }
    tell(draw, lang, EACH_HAD, slots)
    people = (slots["who"], slots["other"])
    things = (slots["something"].thing, slots["something_else"].thing)
    counts = [slots["something"].number, slots["something_else"].number]

    last = None
    movers = draw.pick(((0,), (1,), (0, 1), (1, 0)))
    for i in movers:
        other = 1 - i

        # What may happen: some are handed over only if both have the same thing, and in the only sentence.
        acts = [*GAIN, *DROP]
        if things[i].food:
            acts.append(EAT)
        to_hand = [change for change in REMOVABLE[counts[i]] if (counts[other], change) not in HELD_PAIRS]
        if to_hand and things[i] is things[other] and len(movers) == 1:
            acts.append(HAND)
        subject = begin_sentence(draw, lang, people[i], last)
        act = draw.pick(acts)

        # How many.
        if act in GAIN:
            change = draw.pick(ADDABLE[counts[i]])
        elif act is HAND:
            change = draw.pick(to_hand)
        else:
            change = draw.pick(REMOVABLE[counts[i]])
        changed = {
            "who": subject,
            "other": people[other],
            "amount": amount(things[i], change),
            "number": digits(change),
            "noun": (things[i].zh, things[i].en if change == 1 else things[i].plural),
        }
        tell(draw, lang, act, changed)

        # What they have then.
        counts[i] += change if act in GAIN else -change
        if act is HAND:
            counts[other] += change
        last = people[i]

    return [State("count", {"who": people[i], "amount": amount(things[i], counts[i])}) for i in (0, 1)]


def same_or_other(draw: Draw, thing: Thing):
    """A number of the same thing, or of another."""
    if not draw.pick((True, False)):
        thing = draw.word("thing", other_than=thing)
    return amount(thing, draw.pick(FIRST_COUNTS))
