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
    questions.py        questions with checkable answers about the same world
    scene.py            what holds at each point of a story
    reader.py           reads a story, and says which wishes it meets: the true reward
    requests.py         requests for a story, with what is wished of it
    instructions.py     questions, requests and follow-up questions as rows
    swaps.py            a word for another of its kind
    preferences.py      pairs of a right and a wrong answer

data/bundled.py writes texts and rows into a folder.
"""
