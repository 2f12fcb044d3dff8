"""The stories of the bundled world: their state is kept, and told again at the end.

A story is a function of a `Draw` and a language; it says its sentences and returns what they have decided. That
costs no information, so a model that reads well can know the last sentence almost in full.
"""

from data.world.draw import Draw, Table, coloured, phrases, some, tell
from data.world.words import DAYS, EN, HELD_PAIRS, HOURS, PLACES, WEATHERS, ZH, Person

GAP = ("", " ")  # between two sentences
States = list[tuple[str, dict]]  # what a story has decided: a key of STATES, and its slots

IT_WAS, ON_DAY, IN, WITH, THERE, AND, NOTHING, LEAVE, FETCH, LIFT = phrases("""
那是一个{weather}的{hour}。 | It was a {weather} {hour}.
{day}{hour}， | On {day} {hour}
{a}在{p}里。 | {a} was in the {p}.
{a}在{p}里，手里拿着{x}。 | {a} was in the {p} with {x}.
{p}里有{x}。 | In the {p} there was {x}.
{a}有{x}，{b}有{y}。 | {a} had {x}, and {b} had {y}.
{a}什么也没有。 | {a} had nothing.
{a}把{x}留在{p}里，去了{q}。 | {a} left the {x} in the {p} and went to the {q}.
{a}到{p}里拿起了{x}。 | {a} went to the {p} and picked up the {x}.
{a}拿起了{x}。 | {a} picked up the {x}.
""")
GO = phrases("{a}去了{p}。 | {a} went to the {p}.\n{a}走到了{p}。 | {a} walked to the {p}.")
TAKE = phrases(
    "{a}把{x}带到了{p}。 | {a} took the {x} to the {p}.\n{a}把{x}拿到了{p}。 | {a} carried the {x} to the {p}."
)
GIVE = phrases("{a}把{x}给了{b}。 | {a} gave the {x} to {b}.\n{a}把{x}交给了{b}。 | {a} handed the {x} to {b}.")
GAIN = phrases("{a}又买了{d}。 | {a} bought {n} more {ds}.\n{a}又找到了{d}。 | {a} found {n} more {ds}.")
DROP = phrases("{a}丢了{d}。 | {a} lost {d}.\n{a}卖了{d}。 | {a} sold {d}.")
EAT, HAND = phrases("{a}吃了{d}。 | {a} ate {d}.\n{a}给了{b}{d}。 | {a} gave {b} {d}.")
STATES = dict(zip(("item", "person", "holder", "count"), phrases("""
{x}在{p}里。 | the {x} is in the {p}.
{a}在{p}里。 | {a} is in the {p}.
{x}在{a}手里。 | {a} has the {x}.
{a}有{x}。 | {a} has {x}.
"""), strict=True))  # fmt: skip
OPENINGS = Table((0.5, None), (0.25, IT_WAS), (0.25, ON_DAY))
NEXT = Table((0.55, ("", "")), (0.15, ("然后", "Then ")), (0.15, ("后来", "Later ")), (0.15, ("接着", "Next ")))
ENDINGS = Table((0.7, ("现在", "Now ")), (0.15, ("所以现在", "So now ")), (0.15, ("这时候", "At this point ")))


def opening(c: Draw, lang: int) -> None:
    if phrase := c.choose(OPENINGS):
        slots = {"weather": lambda c: c.pick(WEATHERS), "hour": lambda c: c.pick(HOURS), "day": lambda c: c.pick(DAYS)}
        tell(c, lang, phrase, slots)
        c.say(GAP[lang])


def begin(c: Draw, lang: int, who: Person, last: Person | None) -> tuple[str, str]:
    """Begin a story's next sentence; returns how its subject is named: by pronoun perhaps, if the same as last."""
    c.say(GAP[lang])
    connector = c.choose(NEXT)
    c.say(connector[lang])
    if who is not last:
        return who
    he = who.pronoun if connector[EN] else (who.pronoun[ZH], who.pronoun[EN].capitalize())
    return c.pick((who, he))


def restate(c: Draw, lang: int, states: States) -> None:
    """End a story by telling one of the things that it has decided."""
    c.say(GAP[lang])
    c.say(c.choose(ENDINGS)[lang])
    kind, slots = c.pick(states)
    tell(c, lang, STATES[kind], slots)


def story_where(c: Draw, lang: int) -> States:
    """Two people go about, and a thing is carried along; returns where all are in the end."""
    opening(c, lang)
    a = c.person()
    start = {"a": a, "p": lambda c: c.pick(PLACES), "x": coloured}
    holder = c.pick((a, None))
    tell(c, lang, WITH if holder else IN, start)
    c.say(GAP[lang])
    b = c.person()
    tell(c, lang, IN, other := {"a": b, "p": lambda c: c.pick(PLACES)})
    where = {a.index: start["p"], b.index: other["p"]}
    lies = None  # the place of the thing while nobody holds it
    if not holder:
        c.say(GAP[lang])
        tell(c, lang, THERE, start := {"p": lambda c: c.pick(PLACES), "x": coloured})
        lies = start["p"]
    thing = start["x"].thing
    last = None
    for _ in range(c.pick((2, 3, 4))):
        who = c.pick((a, b))
        here = where[who.index]
        slots = {"a": begin(c, lang, who, last), "x": thing, "p": lambda c, here=here: elsewhere(c, here)}
        if who is holder:
            act = c.pick((*TAKE, LEAVE))
            if act is LEAVE:
                holder, lies = None, here
                slots |= {"p": here, "q": slots["p"]}
        elif lies:
            act = c.pick((*GO, LIFT if lies is here else FETCH))
            if act is LIFT or act is FETCH:
                slots["p"] = lies
                holder, lies = who, None
        else:
            act = c.pick(GO)
        tell(c, lang, act, slots)
        where[who.index] = slots["q" if act is LEAVE else "p"]
        last = who
    people = [("person", {"a": who, "p": where[who.index]}) for who in (a, b)]
    return [("item", {"x": thing, "p": lies or where[holder.index]}), *people]


def elsewhere(c: Draw, here):
    return c.pick([p for p in PLACES if p is not here])


def story_give(c: Draw, lang: int) -> States:
    """Two or three people hand two things on; returns who has each in the end."""
    opening(c, lang)
    slots = {"a": c.person(), "b": Draw.person, "x": coloured, "y": lambda c: coloured(c, slots["x"].thing)}
    tell(c, lang, AND, slots)
    people = [slots["a"], slots["b"]]
    if c.pick((True, False)):
        c.say(GAP[lang])
        people.append(c.person())
        tell(c, lang, NOTHING, {"a": people[-1]})
    things = [slots["x"].thing, slots["y"].thing]
    has = people[:2]  # has[i]: who has things[i]
    last = None
    for _ in range(c.pick((1, 2, 3))):
        i = c.pick((0, 1))
        who = has[i]
        slots = {"a": begin(c, lang, who, last), "x": things[i]}
        slots["b"] = lambda c, who=who: c.pick([p for p in people if p is not who])
        tell(c, lang, c.pick(GIVE), slots)
        has[i], last = slots["b"], who
    return [("holder", {"x": thing, "a": who}) for thing, who in zip(things, has, strict=True)]


MORE = [[d for d in range(1, 10) if (n, d) not in HELD_PAIRS] for n in range(100)]
FEWER = [[d for d in MORE[n] if d < n] for n in range(100)]
COUNTS = range(3, 13)


def story_count(c: Draw, lang: int) -> States:
    """Two people have some things, and one or both get more or fewer; returns how many they have in the end."""
    opening(c, lang)
    slots = {"a": c.person(), "x": lambda c: some(c.named("thing"), c.pick(COUNTS)), "b": Draw.person}
    slots["y"] = lambda c: more_or_other(c, slots["x"].thing)
    tell(c, lang, AND, slots)
    people = (slots["a"], slots["b"])
    things = (slots["x"].thing, slots["y"].thing)
    n = [slots["x"].n, slots["y"].n]
    last = None
    movers = c.pick(((0,), (1,), (0, 1), (1, 0)))
    for i in movers:
        acts = [*GAIN, *DROP]
        if things[i].food:
            acts.append(EAT)
        handed = [d for d in FEWER[n[i]] if (n[1 - i], d) not in HELD_PAIRS]
        if handed and things[0] is things[1] and len(movers) == 1:
            acts.append(HAND)
        a = begin(c, lang, people[i], last)
        act = c.pick(acts)
        d = c.pick(MORE[n[i]] if act in GAIN else handed if act is HAND else FEWER[n[i]])
        fewer = some(things[i], d)
        name = (things[i].zh, things[i].en if d == 1 else things[i].plural)
        tell(c, lang, act, {"a": a, "b": people[1 - i], "d": fewer, "n": (str(d), str(d)), "ds": name})
        n[i] += d if act in GAIN else -d
        if act is HAND:
            n[1 - i] += d
        last = people[i]
    return [("count", {"a": people[i], "x": some(things[i], n[i])}) for i in (0, 1)]


def more_or_other(c: Draw, thing):
    """A number of the same thing, or of another."""
    return some(thing if c.pick((True, False)) else c.named("thing", thing), c.pick(COUNTS))
