"""What holds at each point of a story: who is where, who has what, how many; and what cannot happen then.

Each kind of sentence (stories.py) has a function here that says what it changes. It raises `Contradiction` where it
does not fit what was told before: somebody goes where he is already, takes a thing that is elsewhere, gives what he
does not have, or is told about who was never introduced.

Read next: reader.py, which turns sentences into calls of these.
"""

from data.world import stories
from data.world.phrases import Amount, Pair
from data.world.stories import State, named
from data.world.words import EN, Person, Thing, Word


class Contradiction(Exception):
    """A sentence that does not fit what was told before; says why."""


def check(fits: bool, problem: str) -> None:
    if not fits:
        raise Contradiction(problem)


class Scene:
    """People, things and places are kept by their English names.

    place_of: person → place, where it was told
    holder: thing → who has it; None: nobody, it is in `thing_place`
    counts: (person, thing) → how many
    """

    def __init__(self):
        self.people: set[str] = set()  # who was introduced
        self.place_of: dict[str, str] = {}
        self.holder: dict[str, str | None] = {}
        self.thing_place: dict[str, str] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self.last: Person | None = None  # whom a pronoun means: the one whom the last sentence was about

    def settle(self, who: Person | Pair) -> Person:
        """Who acts: somebody by name, or, by a pronoun, the one who acted in the sentence before."""
        if not isinstance(who, Person):
            fits = self.last is not None and self.last.pronoun[EN] == who[EN].lower()
            check(fits, f"{who[EN]} is said of nobody before")
            who = self.last
        self.last = who
        check(who.en in self.people, f"{who.en} was not introduced")
        return who

    def where_is(self, thing: str) -> str | None:
        """The place of a thing, which goes along with its holder; None if nothing was said about it."""
        holder = self.holder.get(thing)
        return self.place_of.get(holder) if holder else self.thing_place.get(thing)

    def holds(self, state: State) -> bool:
        """Whether a state, the end of a story, is so."""
        told = named(state)
        if state.kind == "item":
            return self.where_is(told["thing"]) == told["place"]
        if state.kind == "person":
            return self.place_of.get(told["who"]) == told["place"]
        if state.kind == "holder":
            return self.holder.get(told["thing"]) == told["who"]
        return self.counts.get((told["who"], told["thing"])) == told["number"]

    def move(self, who: str, place: str) -> None:
        check(who in self.place_of, f"it was not said where {who} was")
        check(self.place_of[who] != place, f"{who} is in the {place} already")
        self.place_of[who] = place

    def receive(self, who: str, something: Amount) -> None:
        """Somebody is said to have something at first."""
        thing = something.thing.en
        if not something.adjective[EN]:
            check((who, thing) not in self.counts, f"it was said how many {something.thing.plural} {who} has")
            self.counts[who, thing] = something.number
            return
        check(thing not in self.holder, f"there is a {thing} already")
        self.holder[thing] = who


# ---- introductions: a name is said, never a pronoun ----------------------------------------------------------------


def was_in(scene: Scene, who: Person, place: Word, something: Amount | None = None) -> None:
    check(who.en not in scene.place_of, f"it was said where {who.en} is")
    scene.people.add(who.en)
    scene.place_of[who.en] = place.en
    if something:
        scene.receive(who.en, something)


def there_was(scene: Scene, place: Word, something: Amount) -> None:
    thing = something.thing.en
    check(thing not in scene.holder, f"there is a {thing} already")
    scene.holder[thing] = None
    scene.thing_place[thing] = place.en


def each_had(scene: Scene, who: Person, something: Amount, other: Person, something_else: Amount) -> None:
    check(who is not other, f"{who.en} is named twice")
    for person, given in ((who, something), (other, something_else)):
        check(person.en not in scene.people, f"{person.en} was introduced before")
        scene.receive(person.en, given)
        scene.people.add(person.en)


def had_nothing(scene: Scene, who: Person) -> None:
    check(who.en not in scene.people, f"{who.en} was introduced before")
    scene.people.add(who.en)


# ---- acts: `who` is settled ----------------------------------------------------------------------------------------


def check_has(scene: Scene, who: Person, thing: Thing) -> None:
    check(scene.holder.get(thing.en) == who.en, f"{who.en} does not have the {thing.en}")


def go(scene: Scene, who: Person, place: Word) -> None:
    scene.move(who.en, place.en)


def take(scene: Scene, who: Person, thing: Thing, place: Word) -> None:
    check_has(scene, who, thing)
    scene.move(who.en, place.en)


def leave(scene: Scene, who: Person, thing: Thing, here: Word, place: Word) -> None:
    check_has(scene, who, thing)
    check(scene.place_of.get(who.en) == here.en, f"{who.en} is not in the {here.en}")
    scene.move(who.en, place.en)
    scene.holder[thing.en] = None
    scene.thing_place[thing.en] = here.en


def fetch(scene: Scene, who: Person, place: Word, thing: Thing) -> None:
    check_lies_in(scene, thing, place.en)
    scene.move(who.en, place.en)
    scene.holder[thing.en] = who.en


def lift(scene: Scene, who: Person, thing: Thing) -> None:
    check(who.en in scene.place_of, f"it was not said where {who.en} was")
    check_lies_in(scene, thing, scene.place_of[who.en])
    scene.holder[thing.en] = who.en


def check_lies_in(scene: Scene, thing: Thing, place: str) -> None:
    check(scene.holder.get(thing.en) is None, f"{scene.holder.get(thing.en)} has the {thing.en}")
    check(scene.thing_place.get(thing.en) == place, f"the {thing.en} is not in the {place}")


def give(scene: Scene, who: Person, thing: Thing, other: Person) -> None:
    check_has(scene, who, thing)
    check_meet(scene, who, other)
    scene.holder[thing.en] = other.en


def check_meet(scene: Scene, who: Person, other: Person) -> None:
    check(who is not other, f"{who.en} gives to {other.en}")
    check(other.en in scene.people, f"{other.en} was not introduced")
    apart = scene.place_of.get(who.en) != scene.place_of.get(other.en)
    check(not apart, f"{who.en} and {other.en} are not in one place")


def gain(scene: Scene, who: Person, amount: Amount, **_) -> None:
    owned = (who.en, amount.thing.en)
    check(owned in scene.counts, f"it was not said how many {amount.thing.plural} {who.en} had")
    scene.counts[owned] += amount.number


def drop(scene: Scene, who: Person, amount: Amount) -> None:
    owned = (who.en, amount.thing.en)
    enough = scene.counts.get(owned, 0) >= amount.number
    check(enough, f"{who.en} has only {scene.counts.get(owned, 0)} {amount.thing.plural}")
    scene.counts[owned] -= amount.number


def eat(scene: Scene, who: Person, amount: Amount) -> None:
    check(amount.thing.food, f"{who.en} eats {amount.thing.plural}")
    drop(scene, who, amount)


def hand(scene: Scene, who: Person, other: Person, amount: Amount) -> None:
    check_meet(scene, who, other)
    drop(scene, who, amount)
    received = (other.en, amount.thing.en)
    scene.counts[received] = scene.counts.get(received, 0) + amount.number


INTRODUCTIONS = (
    (stories.IN, was_in),
    (stories.IN_WITH, was_in),
    (stories.THERE, there_was),
    (stories.EACH_HAD, each_had),
    (stories.NOTHING, had_nothing),
)
ACTS = (
    *((wording, go) for wording in stories.GO),
    *((wording, take) for wording in stories.TAKE),
    (stories.LEAVE, leave),
    (stories.FETCH, fetch),
    (stories.LIFT, lift),
    *((wording, give) for wording in stories.GIVE),
    *((wording, gain) for wording in stories.GAIN),
    *((wording, drop) for wording in stories.DROP),
    (stories.EAT, eat),
    (stories.HAND, hand),
)
