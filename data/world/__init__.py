"""The generator of the bundled corpus: a small world that is told, asked about and translated.

Read the files in this order:

    words.py            the people, things, places and towns, and the facts about them
    draw.py             choices, and the information that they hold
    phrases.py          sentences in two languages, with slots that choices fill
    stories.py          texts with a state: who is where, who has what, how many
    facts.py            texts about a person or a town
    translations.py     sentences and words with their translations
    arithmetic.py       sums, comparisons and word problems
    texts.py            the corpus: all of these, each with its probability
    questions.py        instructions with checkable answers about the same world

data/bundled.py writes texts and questions into a folder.
"""
