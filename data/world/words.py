"""The words of the bundled world: its people, towns, things and places, in Chinese and English, and its facts.

Every word is a tuple that begins with (Chinese, English), so that `word[ZH]` and `word[EN]` read it. The facts (who
lives where, what a town is famous for) are drawn once, from a seed of their own, and are the same on every machine.

First come the tables, then the functions that read them, then the lists that the other files use: `PEOPLE`, `TOWNS`,
`THINGS`, `PLACES` and so on. Read next: draw.py, how a word is chosen and what the choice costs.
"""

import random
import re
from typing import NamedTuple

ZH, EN = 0, 1  # the languages: where a word has its Chinese and where its English
LANGUAGES = ("zh", "en")  # as rows name them
WORLD_SEED = 2718  # of the facts
GROUPS = 10  # a person and a thing (or place) of the same group meet in held-out rows only: see `Draw` in draw.py
NO_GROUP = -1  # a word that may be said beside every other


class Word(NamedTuple):
    """A word that is said as it is."""

    zh: str
    en: str
    group: int = NO_GROUP


class Thing(NamedTuple):
    """Something that can be counted, held and given away."""

    zh: str
    en: str
    group: int
    measure: str  # what Chinese says between a number and the noun: 三[个]苹果
    plural: str  # in English
    food: bool


class Person(NamedTuple):
    """Somebody, and what is so of them: {"job": word, "home": town, ...}."""

    zh: str
    en: str
    group: int
    index: int  # their number in `PEOPLE`
    pronoun: tuple[str, str]
    facts: dict


class Town(NamedTuple):
    """A town, and what is so of it: {"site": word, ...}."""

    zh: str
    en: str
    facts: dict


# ---- the tables ----------------------------------------------------------------------------------------------------
#
# Rows are separated by | or by the end of a line. A row is "Chinese English" (the English may have spaces).

MEN_TABLE = """汤姆 Tom|杰克 Jack|大卫 David|彼得 Peter|约翰 John|保罗 Paul|马克 Mark|迈克 Mike|山姆 Sam|鲍勃 Bob
比尔 Bill|亨利 Henry|乔治 George|弗兰克 Frank|里奥 Leo|奥斯卡 Oscar|维克多 Victor|西蒙 Simon|亚当 Adam
埃里克 Eric|凯文 Kevin|杰森 Jason|丹尼尔 Daniel|罗伯特 Robert|爱德华 Edward|马丁 Martin|菲利普 Philip
安迪 Andy|托尼 Tony|杰瑞 Jerry|哈利 Harry|查理 Charlie|奥利弗 Oliver|卢卡斯 Lucas|雨果 Hugo|瑞安 Ryan
艾伦 Alan|小明 Xiaoming|小刚 Xiaogang|小强 Xiaoqiang|小军 Xiaojun|小龙 Xiaolong|小东 Xiaodong|李雷 Li Lei
王伟 Wang Wei|张强 Zhang Qiang|刘洋 Liu Yang|陈杰 Chen Jie|赵刚 Zhao Gang|周涛 Zhou Tao|吴军 Wu Jun
孙波 Sun Bo|马超 Ma Chao|林峰 Lin Feng|郭亮 Guo Liang|罗勇 Luo Yong|宋凯 Song Kai|唐龙 Tang Long
许明 Xu Ming|冯磊 Feng Lei"""
WOMEN_TABLE = """安娜 Anna|露西 Lucy|玛丽 Mary|莉莉 Lily|爱丽丝 Alice|艾玛 Emma|凯特 Kate|琳达 Linda|海伦 Helen
苏珊 Susan|莎拉 Sarah|南希 Nancy|贝蒂 Betty|格蕾丝 Grace|露比 Ruby|朱莉 Julie|劳拉 Laura|克拉拉 Clara
玛莎 Martha|苏菲 Sophie|艾米 Amy|埃拉 Ella|伊娃 Eva|尼娜 Nina|蒂娜 Tina|莫妮卡 Monica|珍妮 Jenny|温迪 Wendy
辛迪 Cindy|朱迪 Judy|莫莉 Molly|黛西 Daisy|艾薇 Ivy|贝拉 Bella|丽塔 Rita|薇拉 Vera|佐伊 Zoe|小红 Xiaohong
小丽 Xiaoli|小芳 Xiaofang|小美 Xiaomei|小雪 Xiaoxue|小兰 Xiaolan|王芳 Wang Fang|李娜 Li Na|张敏 Zhang Min
刘静 Liu Jing|陈燕 Chen Yan|杨雪 Yang Xue|赵丽 Zhao Li|黄梅 Huang Mei|周琳 Zhou Lin|吴倩 Wu Qian|徐慧 Xu Hui
孙悦 Sun Yue|林玉 Lin Yu|罗娟 Luo Juan|梁琪 Liang Qi|宋佳 Song Jia|韩冰 Han Bing"""

# Chinese, its measure word (3个苹果: three [measure] apple), English singular, English plural.
FOOD_TABLE = """苹果 个 apple apples|梨 个 pear pears|桃子 个 peach peaches|橙子 个 orange oranges
柠檬 个 lemon lemons|香蕉 根 banana bananas|鸡蛋 个 egg eggs|土豆 个 potato potatoes|番茄 个 tomato tomatoes
胡萝卜 根 carrot carrots|饼干 块 cookie cookies|蛋糕 块 cake cakes|糖 颗 candy candies
草莓 颗 strawberry strawberries|樱桃 颗 cherry cherries|李子 个 plum plums|三明治 个 sandwich sandwiches
坚果 颗 nut nuts"""
ITEM_TABLE = """球 个 ball balls|帽子 顶 hat hats|雨伞 把 umbrella umbrellas|故事书 本 storybook storybooks
钥匙 把 key keys|台灯 盏 lamp lamps|盒子 个 box boxes|风筝 只 kite kites|背包 个 backpack backpacks
杯子 个 cup cups|地图 张 map maps|信封 个 envelope envelopes|照片 张 photo photos|手表 块 watch watches
娃娃 个 doll dolls|吉他 把 guitar guitars|相机 台 camera cameras|围巾 条 scarf scarves
篮子 个 basket baskets|铅笔 支 pencil pencils|硬币 枚 coin coins|邮票 张 stamp stamps|蜡烛 支 candle candles
石头 块 stone stones|瓶子 个 bottle bottles|盘子 个 plate plates|勺子 把 spoon spoons|镜子 面 mirror mirrors
毛巾 条 towel towels|卡片 张 card cards"""

# Where stories happen.
PLACE_TABLE = """厨房 kitchen|花园 garden|公园 park|图书馆 library|工厂 factory|市场 market|办公室 office
剧院 theatre|卧室 bedroom|客厅 living room|商店 shop|博物馆 museum|旅馆 hotel|医院 hospital|电影院 cinema
教室 classroom|车库 garage|浴室 bathroom|餐馆 restaurant|银行 bank"""

# What a thing looks like. (Colours are also what somebody likes best.)
COLOUR_TABLE = "红色 red|蓝色 blue|绿色 green|黄色 yellow|白色 white|黑色 black|紫色 purple|粉色 pink"
SIZE_TABLE = "大 big|小 small|新鲜的 fresh"

# The name of a town is a first half and a last half: 青 + 河镇, Green + river.
TOWN_FIRST_TABLE = "青 Green|白 White|石 Stone|金 Gold|银 Silver|云 Cloud"
TOWN_LAST_TABLE = "河镇 river|桥镇 bridge|山镇 hill|湖镇 lake"

# What the facts about people and towns are chosen from.
JOB_TABLE = """老师 a teacher|医生 a doctor|护士 a nurse|农民 a farmer|厨师 a cook|司机 a driver|画家 a painter
歌手 a singer|作家 a writer|面包师 a baker|裁缝 a tailor|工程师 an engineer|律师 a lawyer
警察 a police officer|牙医 a dentist|园丁 a gardener|飞行员 a pilot|科学家 a scientist"""
PET_TABLE = """一只猫 a cat|一只狗 a dog|一只兔子 a rabbit|一只鸟 a bird|一条金鱼 a goldfish|一只乌龟 a turtle
一只鹦鹉 a parrot|一只鸭子 a duck|一匹马 a horse|一只仓鼠 a hamster|一只山羊 a goat|一只鹅 a goose"""
DISH_TABLE = """面条 noodles|饺子 dumplings|米饭 rice|汤 soup|披萨 pizza|鱼 fish|面包 bread|奶酪 cheese
豆腐 tofu|鸡肉 chicken|牛肉 beef|沙拉 salad|煎饼 pancakes|粥 porridge"""
HOBBY_TABLE = """游泳 swimming|看书 reading|唱歌 singing|跳舞 dancing|钓鱼 fishing|做饭 cooking|画画 painting
跑步 running|下棋 playing chess|踢足球 playing football|爬山 climbing mountains|种花 growing flowers
拍照 photography|滑冰 skating"""
MONTH_TABLE = """一月 January|二月 February|三月 March|四月 April|五月 May|六月 June|七月 July|八月 August
九月 September|十月 October|十一月 November|十二月 December"""
SITE_TABLE = "海边 by the sea|山里 in the mountains|河边 by a river|森林旁边 near a forest|平原上 on a plain"
PRODUCT_TABLE = (
    "茶叶 tea|丝绸 silk|蜂蜜 honey|纸 paper|葡萄酒 wine|盐 salt|地毯 carpets|瓷器 china|鲜花 flowers|木雕 wood carvings"
)
REGION_TABLE = "北方 north|南方 south|东部 east|西部 west"

# When a story happens.
WEATHER_TABLE = "晴朗 sunny|寒冷 cold|温暖 warm|下雨 rainy|刮风 windy|安静 quiet"
HOUR_TABLE = "早上 morning|下午 afternoon|晚上 evening"
DAY_TABLE = """星期一 Monday|星期二 Tuesday|星期三 Wednesday|星期四 Thursday|星期五 Friday|星期六 Saturday
星期天 Sunday"""
PAST_TIME_TABLE = "昨天 Yesterday|今天早上 This morning|上个星期 Last week|昨天晚上 Last night"

# One to ten, as they are said before a measure word.
NUMBER_TABLE = "一 one|两 two|三 three|四 four|五 five|六 six|七 seven|八 eight|九 nine|十 ten"


# ---- reading the tables --------------------------------------------------------------------------------------------


def rows(table: str) -> list[str]:
    return re.split(r"[|\n]", table)


def read_words(table: str) -> list[Word]:
    return [Word(*row.split(" ", 1)) for row in rows(table)]


def read_places() -> list[Word]:
    places = read_words(PLACE_TABLE)
    return [place._replace(group=i % GROUPS) for i, place in enumerate(places)]


def read_things() -> list[Thing]:
    """Foods, then items."""
    things = []
    for table, food in ((FOOD_TABLE, True), (ITEM_TABLE, False)):
        for row in rows(table):
            zh, measure, en, plural = row.split()
            group = len(things) % GROUPS
            things.append(Thing(zh, en, group, measure, plural, food))
    return things


PLACES = read_places()
THINGS = read_things()
COLOURS = read_words(COLOUR_TABLE)
SIZES = read_words(SIZE_TABLE)
WEATHERS = read_words(WEATHER_TABLE)
HOURS = read_words(HOUR_TABLE)
DAYS = read_words(DAY_TABLE)
PAST_TIMES = read_words(PAST_TIME_TABLE)
NUMBERS = read_words(NUMBER_TABLE)


# ---- the facts -----------------------------------------------------------------------------------------------------

FACT_WORDS = {
    "site": read_words(SITE_TABLE),
    "product": read_words(PRODUCT_TABLE),
    "region": read_words(REGION_TABLE),
    "job": read_words(JOB_TABLE),
    "pet": read_words(PET_TABLE),
    "food": read_words(DISH_TABLE),
    "hobby": read_words(HOBBY_TABLE),
    "month": read_words(MONTH_TABLE),
    "colour": COLOURS,
}


def draw_towns(rng: random.Random) -> list[Town]:
    towns = []
    for first in read_words(TOWN_FIRST_TABLE):
        for last in read_words(TOWN_LAST_TABLE):
            facts = {kind: rng.choice(FACT_WORDS[kind]) for kind in ("site", "product", "region")}
            towns.append(Town(first.zh + last.zh, first.en + last.en, facts))
    return towns


def draw_people(rng: random.Random, towns: list[Town]) -> list[Person]:
    people = []
    for table, pronoun in ((MEN_TABLE, ("他", "he")), (WOMEN_TABLE, ("她", "she"))):
        for name in read_words(table):
            facts = {kind: rng.choice(FACT_WORDS[kind]) for kind in ("job", "pet", "food", "hobby", "month", "colour")}
            facts["home"] = rng.choice(towns)
            index = len(people)
            people.append(Person(name.zh, name.en, index % GROUPS, index, pronoun, facts))
    return people


# One generator of random numbers, and the towns first: another order would be another world.
_world_rng = random.Random(WORLD_SEED)
TOWNS = draw_towns(_world_rng)
PEOPLE = draw_people(_world_rng, TOWNS)
ACTORS = PEOPLE[::3]  # stories and translations are about these: few names, so that copying one is learnt in minutes


# ---- numbers -------------------------------------------------------------------------------------------------------


def draw_held_pairs() -> frozenset[tuple[int, int]]:
    """A tenth of the pairs of numbers below 100, in both orders: operands in no text and no training row."""
    rng = random.Random(WORLD_SEED)
    pairs = set()
    for a in range(100):
        for b in range(a, 100):
            if rng.random() < 0.1:
                pairs |= {(a, b), (b, a)}
    return frozenset(pairs)


HELD_PAIRS = draw_held_pairs()
OPERANDS = [*range(1, 10), *range(10, 100, 10)]  # what is added to or taken from a number: few digits change


# ---- all words -----------------------------------------------------------------------------------------------------

LEXICON = [*PEOPLE, *TOWNS, *THINGS, *PLACES, *COLOURS, *NUMBERS]  # what the dictionary texts translate


def all_words_zh() -> list[str]:
    """Every Chinese word of the world, longest first: where words begin and end, which Chinese writing does not say."""
    words = {word.zh for word in LEXICON}
    for others in (*FACT_WORDS.values(), SIZES, WEATHERS, HOURS, DAYS, PAST_TIMES):
        words |= {word.zh for word in others}
    return sorted(words, key=lambda zh: (-len(zh), zh))


WORDS_ZH = all_words_zh()
