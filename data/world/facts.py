"""Texts about one person or town of the bundled world: some of its facts, in any order.

The facts themselves are fixed (words.py) and cost nothing: what is chosen is of whom they are told, which of them,
and in which wording.

Read next: translations.py.
"""

from data.world.draw import Draw
from data.world.phrases import GAP, Pair, phrases, tell
from data.world.words import EN, PEOPLE, TOWNS, Person, Town

PERSON_FACTS = {
    "home": phrases(
        "{who}住在{what}。 | {who} lives in {what}.",
        "{whose}家在{what}。 | {whose} home is in {what}.",
    ),
    "job": phrases(
        "{who}是一名{what}。 | {who} is {what}.",
        "{who}的职业是{what}。 | {who} works as {what}.",
    ),
    "pet": phrases(
        "{who}养了{what}。 | {who} keeps {what}.",
        "{whose}宠物是{what}。 | {whose} pet is {what}.",
    ),
    "food": phrases(
        "{who}最喜欢吃{what}。 | {who} likes to eat {what} best.",
        "{who}最爱的食物是{what}。 | {whose} favourite food is {what}.",
    ),
    "hobby": phrases(
        "{who}喜欢{what}。 | {who} likes {what}.",
        "{whose}爱好是{what}。 | {whose} hobby is {what}.",
    ),
    "month": phrases(
        "{who}出生在{what}。 | {who} was born in {what}.",
        "{whose}生日在{what}。 | {whose} birthday is in {what}.",
    ),
    "colour": phrases(
        "{who}最喜欢{what}。 | {who} likes {what} best.",
        "{who}最爱的颜色是{what}。 | {whose} favourite colour is {what}.",
    ),
}
TOWN_FACTS = {
    "region": phrases(
        "{who}在{what}。 | {who} is in the {what}.",
        "{who}是{what}的一个小镇。 | {who} is a small town in the {what}.",
    ),
    "site": phrases(
        "{who}坐落在{what}。 | {who} lies {what}.",
        "{who}位于{what}。 | {who} is {what}.",
    ),
    "product": phrases(
        "{who}以{what}闻名。 | {who} is famous for its {what}.",
        "{who}盛产{what}。 | {who} has plenty of {what}.",
    ),
}
FACTS = {**PERSON_FACTS, **TOWN_FACTS}  # key of a fact → its wordings

# How a sentence names somebody as its subject and as an owner: ("小明", "Xiaoming"), ("小明的", "Xiaoming's").
Naming = tuple[Pair, Pair]
HE = (("他", "He"), ("他的", "His"))
SHE = (("她", "She"), ("她的", "Her"))
IT = (("它", "It"), ("它的", "Its"))


def naming(subject: Person | Town) -> Naming:
    return (subject.zh, subject.en), (subject.zh + "的", subject.en + "'s")


def person_facts(draw: Draw, lang: int) -> None:
    """Three to five facts about somebody."""
    person = draw.pick(PEOPLE)
    pronouns = HE if person.pronoun[EN] == "he" else SHE
    tell_facts(draw, lang, person, list(PERSON_FACTS), pronouns, draw.pick((3, 4, 5)))


def town_facts(draw: Draw, lang: int) -> None:
    """Two or three facts about a town."""
    town = draw.pick(TOWNS)
    tell_facts(draw, lang, town, list(TOWN_FACTS), IT, draw.pick((2, 3)))


def tell_facts(draw: Draw, lang: int, subject: Person | Town, keys: list[str], pronouns: Naming, count: int) -> None:
    """Tell `count` different facts, chosen from `keys`; from the second on, the subject may be a pronoun."""
    untold = list(keys)
    for i in range(count):
        who, whose = naming(subject)
        if i > 0:
            draw.say(GAP[lang])
            who, whose = draw.pick((naming(subject), pronouns))
        key = draw.pick(untold)
        untold.remove(key)
        wording = draw.pick(FACTS[key])
        tell(draw, lang, wording, {"who": who, "whose": whose, "what": subject.facts[key]})
