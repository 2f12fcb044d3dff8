"""Cleans a pile of text: from files of any kind to documents worth training on, with a report of what went and why.

A document passes these files in this order: `reading` (a file's documents, decoded), `mending` with what lies in `text`
(mended, masked, boilerplate cut, measured), `judging`, `rules` (thresholds), `duplicates`, `writing`, `report`.
`passes` runs them over many files with many processes.
"""
